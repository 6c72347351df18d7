"""`agentrl train` on Ray from the outside: interrupted runs can be resumed, and no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

TINY = (
    "env.kwargs.max_steps=5",
    "evaluation.tasks=4",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "warm_start.steps=0",
    "trainer.checkpoint_every=1",
    "policy.tokenizer_episodes=4",
    "policy.hidden_size=32",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.workers.count=1",
    "algorithm.name=ppo",
    "algorithm.entropy_coefficient=0.1",  # so that there is a gradient where no episode succeeds
)
RANKS = ("learner.launcher=ray", "learner.processes=2", "learner.backend=fsdp", "rollout.placement=inline")


class Run:
    """A training command that is running."""

    def __init__(self, folder: Path, overrides: tuple[str, ...]) -> None:
        self.folder = folder / "tiny"
        train = "import sys; from agentrl.cli import main; main(['train', *sys.argv[1:]])"
        where = (f"run.folder={folder}", "run.name=tiny", "trainer.steps=500")
        self.process = subprocess.Popen(
            [sys.executable, "-c", train, "quickstart.yaml", *TINY, *where, *overrides],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while self.steps() < 3:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def ended(self) -> tuple[str, str]:
        """Return its output, once it has ended and no process of it is left."""
        said = self.process.communicate(timeout=150)
        _, alive = psutil.wait_procs(self.family, timeout=120)
        assert [process.cmdline() for process in alive] == []
        return said


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, request.param)
    yield run
    run.process.kill()
    run.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("run", [("rollout.backend=ray", "engine.actors=2"), RANKS], indirect=True)
def test_ctrl_c_ends_it_after_a_step_and_it_can_be_continued(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    printed, complaint = run.ended()
    assert run.process.returncode != 0
    assert f"continue with: agentrl train --resume {run.folder}" in complaint
    assert "training: 500 steps" in printed
    assert (run.folder / "checkpoints" / f"train-{run.steps():06d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("run", [RANKS], indirect=True)
def test_a_rank_that_dies_ends_it_with_its_checkpoints_kept(run: Run) -> None:
    next(each for each in run.family if "RankHost" in each.name()).kill()
    _, complaint = run.ended()
    assert run.process.returncode == 2
    assert re.search(r"error: rank \d on [\d.]+ was lost: .* agentrl train --resume FOLDER", complaint)
    assert (run.folder / "checkpoints" / f"train-{run.steps() - 1:06d}").is_dir()
