"""Our engine compared with TextWorld's; skipped if the extra `alfworld-reference` is not installed."""

import importlib.util
from collections.abc import Iterator

import pytest

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl_envs.alfworld import differential
from agentrl_envs.alfworld.differential import Tally
from agentrl_envs.alfworld.reference import ReferenceEngine
from agentrl_envs.alfworld_env import ALFWorldEnv

INSTALLED = all(importlib.util.find_spec(name) for name in ("textworld", "fast_downward"))
needs_textworld = pytest.mark.skipif(not INSTALLED, reason="the extra alfworld-reference is not installed")


def assert_equal(tally: Tally, least: int) -> None:
    print(f"{tally.games} games, {tally.comparisons} comparisons, {len(tally.differences)} differences")
    assert tally.differences == []
    assert tally.games >= least
    assert tally.comparisons > tally.games


@needs_textworld
def test_a_game_of_every_type_is_played_equally() -> None:
    assert_equal(differential.run(6, steps=10), least=6)


@needs_textworld
def test_adversarial_games_are_played_equally() -> None:
    assert_equal(differential.run(4, steps=10, adversarial=True, seed=1), least=2)


@needs_textworld
def test_texts_are_cut_equally() -> None:
    tally = differential.compare_texts(500)
    assert tally.differences == []
    assert tally.comparisons == 500


@needs_textworld
@pytest.mark.slow
def test_sixty_games_are_played_equally() -> None:
    tally = differential.run(60, steps=40, seed=2)
    assert_equal(tally, least=60)
    assert set(tally.task_types.values()) == {10}


@pytest.fixture
def textworld_env() -> Iterator[ALFWorldEnv]:
    env = ALFWorldEnv(engine="textworld", max_receptacles=6, object_types=8, expert=True)
    yield env
    env.close()


@needs_textworld
def test_the_environment_plays_with_either_engine(textworld_env: ALFWorldEnv) -> None:
    native = ALFWorldEnv(max_receptacles=6, object_types=8, expert=True)
    task = {"task": "valid_unseen/3"}
    ours, theirs = native.reset(options=task), textworld_env.reset(options=task)
    assert ours[0] == theirs[0]
    while ours[-1]["expert"] is not None:
        assert theirs[-1]["actions"] == ours[-1]["actions"]
        command = ours[-1]["expert"]
        assert theirs[-1]["expert"] == command
        ours, theirs = native.step(command), textworld_env.step(command)
        assert theirs[:4] == ours[:4]
    assert theirs[-1]["success"]
    assert textworld_env.snapshot is None


@needs_textworld
def test_one_process_has_one_textworld(textworld_env: ALFWorldEnv) -> None:
    with pytest.raises(ConfigError, match="one environment per process"):
        ReferenceEngine()
    textworld_env.close()
    ReferenceEngine().close()


@pytest.mark.skipif(INSTALLED, reason="the extra alfworld-reference is installed")
def test_without_textworld_the_message_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[alfworld-reference\]'"):
        ALFWorldEnv(engine="textworld")
