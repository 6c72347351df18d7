"""A run on two processes from the outside: torchrun scripts/train.py, and what it leaves."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

import agentrl
from agentrl.errors import ConfigError
from agentrl.learn.ranks import Ranks
from agentrl.training.setup import open_session

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = (
    "env.kwargs.max_steps=5",
    "evaluation.tasks=5",
    "evaluation.baselines=[random, cloned]",
    "warm_start.steps=4",
    "warm_start.batch_size=4",
    "warm_start.demonstrations=40",
    "warm_start.learner.optimizer=adamw",
    "learner.optimizer=adamw",
    "learner.mini_batches=2",
    "trainer.steps=4",
    "trainer.checkpoint_every=3",
    "trainer.save_episodes_every=2",
    "policy.tokenizer_episodes=4",
    "policy.hidden_size=32",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.placement=inline",
    "algorithm.name=ppo",
    "algorithm.entropy_coefficient=0.1",  # so that there is a gradient where no episode succeeds
)
SHARDED = ("learner.backend=fsdp", "warm_start.learner.backend=fsdp")


def torchrun(folder: Path, *more: str) -> list[str]:
    script = [str(ROOT / "scripts" / "train.py"), str(ROOT / "configs" / "quickstart.yaml")]
    return [*TORCHRUN, *script, *TINY, f"run.folder={folder}", "run.name=tiny", *more]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    config = agentrl.load_config("quickstart.yaml", *TINY, f"run.folder={folder}", "run.name=tiny")
    return agentrl.train(config, quiet=True).folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    answer = subprocess.run(torchrun(folder, *SHARDED), capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.count("on cpu of 2 processes") == 1  # the first one speaks
    return folder / "tiny"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Episodes and evaluations are equal, numbers and weights to rounding."""
    assert len(rows(one)) == len(rows(other)) == 8
    assert all(row["train/learner/grad_norm"] > 1e-3 for row in rows(one))
    for row, same in zip(rows(one), rows(other), strict=True):
        assert row.pop("stage") == same.pop("stage")
        assert row == pytest.approx(same, rel=1e-3, abs=1e-4)
    for name in ("random", "cloned", "trained"):
        found, same = (json.loads((run / "evaluations.json").read_text())[name] for run in (one, other))
        assert {how: each["success_rate"] for how, each in found.items()} == {
            how: each["success_rate"] for how, each in same.items()
        }
    weights, same_weights = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert max(float((weights[name] - same_weights[name]).abs().max()) for name in weights) < 1e-4


@pytest.mark.slow
def test_two_processes_train_what_one_trains(alone: Path, together: Path) -> None:
    assert_same_run(together, alone)
    assert {path.name for path in (together / "episodes").iterdir()} == {
        path.name for path in (alone / "episodes").iterdir()
    }
    assert (together / "report.html").is_file()
    assert not [path for path in together.rglob("*") if ".partial" in path.name]


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(together: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(together, run)
    shutil.rmtree(run / "checkpoints" / "train-000004")
    shutil.rmtree(run / "model")
    evaluations = json.loads((run / "evaluations.json").read_text())
    del evaluations["trained"]
    (run / "evaluations.json").write_text(json.dumps(evaluations))
    try:
        agentrl.resume(run, quiet=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # that of one, which FSDP2 wanted
    assert_same_run(run, together)


@pytest.mark.slow
def test_with_staleness_0_two_processes_that_play_beside_learning_train_the_same(
    together: Path, tmp_path: Path
) -> None:
    beside = ("trainer.mode=async", "trainer.max_staleness=0")
    subprocess.run(torchrun(tmp_path, *SHARDED, *beside), check=True, capture_output=True, timeout=280)
    path = tmp_path / "tiny" / "metrics.jsonl"
    found = [
        {name: value for name, value in row.items() if "staleness" not in name} for row in rows(path.parent)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    assert_same_run(tmp_path / "tiny", together)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_two_processes_stop_together_when_asked_to(together: Path, tmp_path: Path, mode: str) -> None:
    command = torchrun(tmp_path, *SHARDED, f"trainer.mode={mode}")
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, complaint = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "continue with: agentrl train --resume" in complaint
    done = len(metrics.read_text().splitlines())
    assert (tmp_path / "tiny" / "checkpoints" / f"train-{done - 4:06d}").is_dir()
    resumed = [*TORCHRUN, str(ROOT / "scripts" / "train.py"), "--resume", str(tmp_path / "tiny")]
    subprocess.run(resumed, check=True, capture_output=True, timeout=280)
    if mode == "sync":
        assert_same_run(tmp_path / "tiny", together)
    assert [row["step"] for row in rows(tmp_path / "tiny")] == [1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.backend=single", "learner.backend is single, wanted fsdp for 2 processes"),
        (
            "learner={backend: fsdp, launcher: ray, processes: 4}",
            "learner.processes is 4, but 2 were started",
        ),
        ("rollout.groups_per_step=3", "rollout.groups_per_step is 3, wanted a multiple of the 2 processes"),
    ],
)
def test_what_two_processes_cannot_share_is_refused_first(
    override: str, message: str, tmp_path: Path
) -> None:
    config = agentrl.load_config(None, *TINY, *SHARDED, f"run.folder={tmp_path}", override)
    with pytest.raises(ConfigError, match=message):
        open_session(config, ranks=Ranks(0, 2))
    assert list(tmp_path.iterdir()) == []
