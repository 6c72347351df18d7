"""A stop at any moment loses nothing: the resumed folder equals that of a run that never stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

STOPS = Path(__file__).with_name("stops.py")


@pytest.mark.parametrize(
    ("count", "seed"), [(3, 0), pytest.param(200, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_run_stopped_at_any_moment_ends_as_one_that_never_stopped(
    count: int, seed: int, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    """SIGINT, SIGTERM and SIGKILL in turn; all files but the clocks and the report, which shows them."""
    hotcold = str(Path(str(examples["hotcold"].__file__)).parent)
    answer = subprocess.run(
        [sys.executable, str(STOPS), hotcold, str(tmp_path), str(count), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert sum(found["stopped"].values()) == count
    assert sum(times for what, times in found["stopped"].items() if what.endswith(" stopped")) >= count // 2
    assert found["differ"] == {}, answer.stderr[-2000:]
