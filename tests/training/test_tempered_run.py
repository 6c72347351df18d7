"""A run whose algorithm chooses the temperature of every reply and token."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.algorithms import recipe as registry
from agentrl.algorithms.algorithm import Algorithm, keep_all, mismatch_metrics
from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.hooks import Context, MiniBatch, ReplyState, TokenTemperature, requires
from agentrl.algorithms.recipe import Recipe, recipe, recipe_names
from agentrl.data.storage import read_episodes
from agentrl.errors import ConfigError, RequirementError
from agentrl.planning.preflight import check_ahead, check_algorithm
from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.run.logger import RunLogger


def follow(entropy: float) -> float:
    return 0.5 + entropy / 2


class Thermostat:
    """Chooses temperatures by member, turn before, and the mean log-probability of the steps before."""

    name = "thermostat"

    def __init__(self) -> None:
        self.level = 0.0

    @requires("rollout:entropy", "rollout:token_temperature")
    def heat(self, state: ReplyState, context: Context) -> TokenTemperature:
        spread = 0.0 if state.previous is None else state.previous.entropy or 0.0
        return TokenTemperature(state.temperature + self.level + state.member / 4 + spread / 8, follow)

    def measure(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        return {"thermostat/level": self.level}

    def update(self, rollout: MiniBatch, context: Context) -> None:
        self.level -= float(rollout.batch.logprobs[rollout.batch.action_mask].mean()) / 10

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        self.level = state["level"]


@dataclass(frozen=True)
class Heated(Recipe):
    """Replies at temperatures by episode, turn, token and step."""

    def build(self) -> Algorithm:
        thermostat = Thermostat()
        return Algorithm(
            select=keep_all,
            rollout=RolloutPlan(
                temperature=lambda context: 1.0 + context.step / 2, reply_temperature=thermostat.heat
            ),
            advantage=lambda batch, context: batch.logprobs + batch.action_mask,
            diagnostics=(mismatch_metrics, thermostat.measure),
        )


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Register the recipe for these tests only: others walk all recipes."""
    recipe_names()  # loads the installed ones first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_recipes", dict(registry._recipes))
        recipe("heated")(Heated)
        yield


def config(folder: Path) -> agentrl.RunConfig:
    return agentrl.load_config(
        "quickstart.yaml",
        "rollout.placement=inline",
        "rollout.groups_per_step=2",
        "rollout.group_size=3",
        "rollout.max_turns=4",
        "evaluation.tasks=1",
        "evaluation.baselines=[]",
        "evaluation.instruction_check=false",
        "trainer.checkpoint_every=1",
        "trainer.save_episodes_every=1",
        "warm_start.steps=0",
        "trainer.steps=2",
        "algorithm.name=heated",
        f"run.folder={folder}",
        "run.name=run",
    )


def rows(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_temperatures_are_those_of_the_step_and_a_resumed_run_is_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = agentrl.train(config(tmp_path / "whole"), quiet=True)
    write = RunLogger.write

    def interrupting(self: RunLogger, row: dict[str, Any], **kwargs: Any) -> None:
        write(self, row, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            agentrl.train(config(tmp_path), quiet=True)
    assert len(rows(tmp_path / "run")) == 1
    resumed = agentrl.resume(tmp_path / "run", quiet=True)
    assert rows(resumed.folder) == rows(whole.folder)
    files = [run.model / "model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    level = 0.0
    for step, row in enumerate(rows(whole.folder)):
        assert row["train/algorithm/mismatch/max"] < 1e-4
        episodes = read_episodes(whole.folder / "episodes" / f"train-{step + 1:06d}.parquet")
        assert len(episodes) == 6
        for index, episode in enumerate(episodes):
            spread = 0.0
            for turn in episode.turns:
                assert turn.temperature == pytest.approx(1.0 + step / 2 + level + index % 3 / 4 + spread / 8)
                used = turn.temperatures or (turn.temperature,) * len(turn.action_ids)
                decided = [value for value, own in zip(used, turn.action_mask, strict=True) if own]
                assert decided[1:] == [follow(entropy) for entropy in turn.action_entropies[:-1]]
                spread = turn.entropy or 0.0
        level = row["train/algorithm/thermostat/level"]
        assert level > 0


@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(name="vllm"),
        EngineConfig(name="vllm", vllm=VllmConfig("http://localhost:1")),
        EngineConfig(actors=2),
    ],
)
def test_engines_that_keep_one_temperature_for_a_reply_are_refused_before_the_run(
    engine: EngineConfig,
) -> None:
    algorithm = Heated().build()
    check_algorithm(algorithm, EngineConfig())
    with pytest.raises(
        RequirementError,
        match=r"rollout requires rollout:token_temperature \(only engine.name=torch without engine.actors",
    ):
        check_algorithm(algorithm, engine)


def test_a_state_that_temperatures_depend_on_is_refused_where_steps_are_played_ahead() -> None:
    with pytest.raises(ConfigError, match="rollout reads the state of thermostat"):
        check_ahead(Heated().build(), "async")
