"""Fixtures shared by all tests, and the count of tests that read the reference folder."""

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from agentrl.env import load_plugins

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The background jobs of a script ignore Ctrl-C, and so would the tests that press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """The folder of recorded traces; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("AGENTRL_REFERENCE", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference folder at {folder} (set AGENTRL_REFERENCE)")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = skipped = 0
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            if "reference" in report.keywords:
                ran += outcome != "skipped"
                skipped += outcome == "skipped"
    terminalreporter.write_line(f"reference tests: {ran} ran, {skipped} skipped")


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Reports have no figures: to draw them takes longer than to train a tiny run. Tests of reports draw."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("success", "learning_curve", "entropy_over_steps", "entropy_by_turn", "signals"):
            patch.setattr(f"agentrl.evaluation.figures.draw_{name}", lambda *_: "")
        yield


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The files that CONTRIBUTING.md shows, imported; the environment and the recipe are registered."""
    folder = tmp_path_factory.mktemp("examples")
    modules = {}
    for name, body in re.findall(
        r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    ):
        (folder / f"{name}.py").write_text(body)
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    load_plugins()
    modules["hotcold"].plug_in()
    return modules
