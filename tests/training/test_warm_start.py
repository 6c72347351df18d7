"""What comes before learning ends, also in an environment that does not."""

from typing import Any

import gymnasium
import pytest

from agentrl.env import TextSpace
from agentrl.errors import ConfigError
from agentrl.policy.tokens import fit_tokenizer, make_dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.run import policies
from agentrl.run.settings import RunConfig, load_config
from agentrl.training import warm_start


class Endless(gymnasium.Env[str, str]):
    """Goes on for ever, but for one task; its expert knows what to do next, always."""

    splits = ("train",)
    observation_space = action_space = TextSpace()
    steps = 0

    def tasks(self, split: str) -> list[str]:
        return ["long"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return "begin", self.info()

    def step(self, action: str) -> Any:
        type(self).steps += 1
        return "go on", 0.0, False, False, self.info()

    def info(self) -> dict[str, Any]:
        return {"success": False, "actions": ["go", "stay"], "expert": "go"}


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endless, "steps", 0)


def config(*more: str) -> RunConfig:
    return load_config(None, "env.id=test/Endless-v0", "policy.max_context=100000", *more)


def heard(config: RunConfig) -> int:
    with EnvironmentPool(Endless) as pool:
        return len(policies.environment_text(config, ["long"], pool, RandomPlayer()))


def test_text_for_a_tokenizer_is_played_within_the_turn_limit() -> None:
    # An observation and an action of each of the 7 turns, in each of the 4 episodes.
    assert heard(config("rollout.max_turns=7", "policy.tokenizer_episodes=4")) == 2 * 7 * 4


def test_text_for_a_tokenizer_is_not_waited_for_where_no_episode_ends() -> None:
    assert heard(config("policy.tokenizer_episodes=200")) == 2 * 1000 * 10
    assert Endless.steps == 1000 * 10


def test_a_tokenizer_is_fitted_on_no_more_text_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_MAX_TEXT_CHARS", 5 + 5 + 3)
    with EnvironmentPool(Endless) as pool:
        more = "rollout.max_turns=4", "policy.tokenizer_episodes=9"
        texts = policies.environment_text(config(*more), ["long"], pool, RandomPlayer())
    assert texts == ["begin", "go on", "go "]
    assert Endless.steps == 4


def demonstrate(config: RunConfig) -> None:
    dialogue = make_dialogue(fit_tokenizer(["begin go on go stay"] * 9, 300))
    with EnvironmentPool(Endless) as pool:
        warm_start.demonstrations(config, ["long"], pool, dialogue)


def test_demonstrations_keep_to_the_turn_limit() -> None:
    with pytest.raises(ConfigError, match="solved 0 of 12 tasks"):
        demonstrate(config("warm_start.steps=1", "warm_start.demonstrations=12", "rollout.max_turns=5"))
    assert Endless.steps == 12 * 5


def test_an_expert_that_comes_to_no_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (policies, warm_start):
        monkeypatch.setattr(module, "FALLBACK_MAX_TURNS", 20)
    with pytest.raises(ConfigError, match="came to no end in 10 of them within 20 turns"):
        demonstrate(config("warm_start.steps=1", "warm_start.demonstrations=500"))
    assert Endless.steps == 20 * 10


def test_an_episode_that_nothing_limits_ends_all_the_same() -> None:
    with EnvironmentPool(Endless) as pool:
        spec = EpisodeSpec("e", "test/Endless-v0", "long", 0)
        (episode,) = collect([spec], RandomPlayer(), pool, max_active=1).episodes
    assert (len(episode.turns), episode.stop.value) == (10_000, "turn_limit")
