"""The task and the instructions of an environment reach the player, wherever the environment runs."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from agentrl.env import Factory, MultiTurnEnv, check_text_env
from agentrl.env.briefing import Briefing, read_briefing
from agentrl.errors import EnvironmentContractError
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool, Environments
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.recording import RecordingPlayer
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments


class Talking(MultiTurnEnv):
    """Environment that says all it can about itself."""

    instructions: Any = "Say the word."
    action_forms: ClassVar[Any] = {"say ": "say WORD"}

    def problems(self, split: str) -> list[str]:
        return ["ping", "pong"] if split == "train" else ["peng"]

    def start(self, problem: str) -> str:
        self.word = problem
        return "a room"

    def info(self) -> dict[str, Any]:
        return {"task_text": f"say {self.word}"} if self.steps == 0 else {}

    def act(self, action: str) -> tuple[str, float, bool]:
        return "no", 0.0, False


def test_a_briefing_holds_what_an_environment_declares_and_its_task() -> None:
    env = Talking(max_steps=7)
    _, info = env.reset(options={"task": "train/1"})
    told = Briefing("say pong", "Say the word.", {"say ": "say WORD"}, 7)
    assert read_briefing(env, info) == told
    report = check_text_env(Talking)
    assert report.passed, str(report)
    assert "instructions" in report.declares


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("instructions", 3, "instructions is 3 .* wanted a str"),
        ("action_forms", ["say "], "action_forms is .* wanted a mapping of prefixes to forms"),
        ("action_forms", {"say ": 1}, "action_forms is .* wanted a mapping of prefixes to forms"),
    ],
)
def test_texts_of_another_type_break_the_contract(name: str, value: Any, wanted: str) -> None:
    wrong: Any = type("Wrong", (Talking,), {name: value})
    with pytest.raises(EnvironmentContractError, match=wanted):
        read_briefing(wrong(), {})
    (failed,) = [check for check in check_text_env(wrong).checks if check.name == "interface"]
    assert failed.status == "failed"
    assert name in failed.detail


def played(environments: Environments, env: str, task: str, max_turns: int) -> list[Briefing]:
    player = RecordingPlayer(RandomPlayer())
    collect([EpisodeSpec("e", env, task, 0)], player, environments, max_active=1, max_turns=max_turns)
    return [request.briefing for request in player.requests["e"]]


def test_every_request_of_an_episode_carries_the_briefing_of_its_start() -> None:
    told = Briefing("say ping", "Say the word.", {"say ": "say WORD"}, 20)
    assert played(EnvironmentPool(Talking), "test/Talking-v0", "train/0", 30) == [told] * 20
    shorter = replace(told, max_steps=2)
    assert played(EnvironmentPool(Talking), "test/Talking-v0", "train/0", 2) == [shorter] * 2


def test_a_briefing_comes_out_of_a_worker_process() -> None:
    make = Factory("agentrl/ALFWorld-v0", max_receptacles=4, object_types=2)
    here = played(EnvironmentPool(make), make.id, "train/0", 2)
    with ProcessEnvironments(make, 1, WorkersConfig(count=1, environments=1)) as environments:
        assert played(environments, make.id, "train/0", 2) == here
    assert here[0].task
    assert "go to desk 1" in here[0].instructions


@pytest.mark.parametrize(
    ("id", "arguments", "task"),
    [
        ("agentrl/ALFWorld-v0", {"text": "raw"}, "put "),
        ("agentrl/ALFWorld-v0", {"text": "compact"}, "put "),
        ("agentrl/MathTools-v0", {"tools": "calculator"}, ""),
        ("agentrl/Reasoning-v0", {}, ""),
    ],
)
def test_built_in_environments_name_the_task_and_say_what_to_do(
    id: str, arguments: dict[str, Any], task: str
) -> None:
    env = Factory(id, **arguments)()
    observation, info = env.reset(seed=0, options={"task": "train/0"})
    told = read_briefing(env, info)
    assert told.task is not None
    assert told.task in observation
    assert len(told.task) < len(observation)
    assert told.task.startswith(task)
    assert len(told.instructions) > 40
    env.close()
