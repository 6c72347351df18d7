"""A run whose algorithm remembers goes on after a stop as if it had not been stopped."""

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import agentrl
from agentrl.algorithms import recipe as registry
from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import Recipe, recipe, recipe_names
from agentrl.data.batch import Batch
from agentrl.errors import CheckpointError, ConfigError
from agentrl.planning.preflight import check_ahead
from agentrl.run.logger import RunLogger

pytestmark = pytest.mark.usefixtures("undrawn")


class Critic:
    """Compares the length of a row with a linear model of it, which Adam trains on each rollout batch."""

    name = "critic"

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        nn.init.ones_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)

    def expected(self, batch: Batch) -> Tensor:
        return self.model(batch.logprobs[..., None]).squeeze(-1)

    def advantage(self, batch: Batch, context: Context) -> Tensor:
        return batch.lengths[:, None] / 100 - self.expected(batch)

    def measure(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        return {"critic/weight": self.model.weight.item()}

    def update(self, rollout: MiniBatch, context: Context) -> None:
        batch = rollout.batch
        error = (self.expected(batch) - batch.lengths[:, None] / 100)[batch.action_mask]
        self.optimizer.zero_grad()
        error.square().mean().backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Remembering(Recipe):
    """An advantage by a critic of its own."""

    def build(self) -> Algorithm:
        critic = Critic()
        return Algorithm(select=keep_all, advantage=critic.advantage, diagnostics=(critic.measure,))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Register the recipe for these tests only: others walk all recipes."""
    recipe_names()  # loads the installed ones first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_recipes", dict(registry._recipes))
        recipe("remembering")(Remembering)
        yield


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(
        "quickstart.yaml",
        "rollout.placement=inline",
        "rollout.groups_per_step=2",
        "evaluation.tasks=1",
        "evaluation.baselines=[]",
        "evaluation.instruction_check=false",
        "trainer.checkpoint_every=1",
        "trainer.save_episodes_every=0",
        "warm_start.steps=0",
        "trainer.steps=3",
        "algorithm.name=remembering",
        f"run.folder={folder}",
        "run.name=run",
        *more,
    )


def rows(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted after its second step."""
    folder, write = tmp_path_factory.mktemp("stopped"), RunLogger.write

    def interrupting(self: RunLogger, row: dict[str, Any], **kwargs: Any) -> None:
        write(self, row, **kwargs)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            agentrl.train(config(folder), quiet=True)
    return folder


def test_a_resumed_run_has_the_rows_weights_and_state_of_an_uninterrupted_one(
    stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    resumed = agentrl.resume(tmp_path / "run", quiet=True)
    whole = agentrl.train(config(tmp_path / "whole"), quiet=True)
    assert rows(resumed.folder) == rows(whole.folder)
    logged = [row["train/algorithm/critic/weight"] for row in rows(whole.folder)]
    assert len(set(logged)) == 3
    files = [run.model / "model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    states = [
        torch.load(run.folder / "checkpoints/train-000003/learner.pt", weights_only=True)["stateful"]
        for run in (whole, resumed)
    ]
    assert torch.equal(*(state["critic"]["model"]["weight"] for state in states))
    assert float(states[0]["critic"]["model"]["weight"]) == logged[-1]


def rewritten(run: Path, stateful: Mapping[str, Any] | None) -> None:
    """Change the components' states in the newest checkpoint; None makes it one of an older version."""
    checkpoint = max((run / "checkpoints").glob("train-*"))
    state = torch.load(checkpoint / "learner.pt", weights_only=True)
    del state["stateful"]
    torch.save(state if stateful is None else state | {"stateful": stateful}, checkpoint / "learner.pt")
    hashes = json.loads((checkpoint / "hashes.json").read_text())
    hashes["learner.pt"] = sha256((checkpoint / "learner.pt").read_bytes()).hexdigest()
    (checkpoint / "hashes.json").write_text(json.dumps(hashes))


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_warning(
    stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    rewritten(tmp_path / "run", None)
    agentrl.resume(tmp_path / "run")
    told = " ".join("".join(capfd.readouterr()).split())
    assert "train-000002 holds no state of the algorithm's critic, which starts anew" in told
    assert len(rows(tmp_path / "run")) == 3


def test_the_state_of_a_component_that_the_algorithm_lacks_is_refused(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    rewritten(tmp_path / "run", {"actor": {}})
    with pytest.raises(CheckpointError, match="holds the state of actor, which the algorithm does not have"):
        agentrl.resume(tmp_path / "run", quiet=True)


def test_a_memory_that_the_rollout_reads_is_refused_where_steps_are_played_ahead() -> None:
    class Curious(Critic):
        def select(self, groups, context):
            return groups

    check_ahead(Remembering().build(), "async")
    curious = Algorithm(select=Curious().select)
    check_ahead(curious, "sync")
    with pytest.raises(ConfigError, match="async, and the algorithm's rollout reads the state of critic"):
        check_ahead(curious, "async")
