"""A run whose rollouts and updates overlap."""

import json
import os
import signal
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import agentrl
from agentrl.data.storage import read_episodes
from agentrl.errors import TooManyAbortedError
from agentrl.run.logger import RunLogger
from agentrl.run.signals import RunInterrupted

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=4",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "warm_start.steps=3",
    "warm_start.demonstrations=24",
    "trainer.steps=5",
    "trainer.checkpoint_every=2",
    "trainer.save_episodes_every=1",
    "policy.tokenizer_episodes=4",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.placement=inline",
)


@pytest.fixture(autouse=True)
def _environments(examples: dict[str, ModuleType]) -> None:
    """Register what the runs play."""


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *TINY, f"run.folder={folder}", "run.name=run", *more)


def rows(run: agentrl.Run) -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "train"]


def test_with_staleness_0_a_run_is_the_one_that_takes_turns(tmp_path: Path) -> None:
    more = ("evaluation.every=2", "learner.epochs=2")
    turns = agentrl.train(config(tmp_path / "sync", *more), quiet=True)
    beside = agentrl.train(
        config(tmp_path / "async", *more, "trainer.mode=async", "trainer.max_staleness=0"), quiet=True
    )
    weights = [(run.folder / "model/model.safetensors").read_bytes() for run in (turns, beside)]
    assert weights[0] == weights[1]
    assert rows(turns) == [
        {name: value for name, value in row.items() if not name.startswith("train/rollout/staleness/")}
        for row in rows(beside)
    ]
    assert [
        (row["train/rollout/staleness/mean"], row["train/rollout/staleness/max"]) for row in rows(beside)
    ] == [(0, 0)] * 5
    measured = [json.loads((run.folder / "evaluations.json").read_text()) for run in (turns, beside)]
    assert measured[0] == measured[1]


def test_stale_tokens_are_known_bounded_and_weighted(tmp_path: Path) -> None:
    run = agentrl.train(config(tmp_path, "trainer.mode=async", "learner.learning_rate=0.01"), quiet=True)
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert max(row["train/rollout/staleness/max"] for row in found) == 1
    assert all(
        row["train/algorithm/mismatch/max"] < 1e-4 for row in found if row["train/rollout/staleness/max"] == 0
    )
    assert any(
        row["train/algorithm/mismatch/max"] > 1e-3 for row in found if row["train/rollout/staleness/max"] == 1
    )
    assert all("train/algorithm/mismatch/capped" in row for row in found)
    for row in found:
        episodes = read_episodes(run.folder / "episodes" / f"train-{row['step']:06d}.parquet")
        drawn = {turn.policy_version for episode in episodes for turn in episode.turns}
        assert drawn <= {row["step"] - 2, row["step"] - 1}
    times = json.loads((run.folder / "summary.json").read_text())["times"]
    assert {"learning.waited.wall", "rollout.waited.wall"} <= times.keys()


def test_an_interrupt_leaves_a_run_that_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RunLogger.write

    def interrupting(self: RunLogger, row: dict[str, Any], **kwargs: Any) -> None:
        write(self, row, **kwargs)
        if (row["stage"], row["step"]) == ("train", 3):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(RunLogger, "write", interrupting)
        with pytest.raises(RunInterrupted, match="stopped after train step 3"):
            agentrl.train(config(tmp_path, "trainer.mode=async"), quiet=True)
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout"]
    run = agentrl.resume(tmp_path / "run", quiet=True)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    weights = load_file(run.model / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_what_stops_the_player_stops_the_run_and_loses_nothing(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = examples["hotcold"].HotCold.step

    def breaking(self: Any, action: str) -> Any:
        if (tmp_path / "run/episodes/train-000002.parquet").exists():
            raise OSError("the wire was cut")
        return step(self, action)

    with monkeypatch.context() as patched:
        patched.setattr(examples["hotcold"].HotCold, "step", breaking)
        with pytest.raises(
            TooManyAbortedError,
            match=r"(?s)training step [345], rollout\.max_aborted_share=0\.2.*OSError: the wire was cut",
        ):
            agentrl.train(config(tmp_path, "trainer.mode=async"), quiet=True)
    run = agentrl.resume(tmp_path / "run", quiet=True)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
