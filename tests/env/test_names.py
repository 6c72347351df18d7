"""An unknown name comes back with the nearest known ones."""

from itertools import count

from text_worlds import Corridor

from agentrl.env import text_env, unknown
from agentrl.errors import ConfigError


def test_nothing_near_suggests_nothing_and_lists_what_there_is() -> None:
    error = unknown("split", "zzz", ["train", "test"])
    assert isinstance(error, ConfigError)
    assert str(error) == "split 'zzz' is unknown. Known: train, test"


def test_long_lists_and_names_are_cut() -> None:
    message = str(unknown("task", "x" * 10_000, (f"train-{i}" for i in count())))
    assert "train-7, …" in message
    assert len(message) < 400


def test_nothing_known_is_said() -> None:
    assert str(unknown("split", None, [])) == "split None is unknown. Known: none"


def test_the_environment_beneath_its_wrappers_can_be_had_typed() -> None:
    env = Corridor()
    assert text_env(env) is env
