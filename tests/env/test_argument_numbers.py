"""Numbers that an environment's constructor is given are held to bounds."""

import math
from typing import Any

import pytest

from agentrl.env import MultiTurnEnv, OneStepEnv
from agentrl.env.numbers import real_number, whole_number
from agentrl.env.registry import Factory, make
from agentrl.env.sandbox import Limits
from agentrl.errors import ConfigError
from agentrl.run.env_backend import environment_factory
from agentrl.run.settings import config_from_tree

SENSELESS = (-1, 1e308, math.nan, math.inf, "", [3], int("7" * 400), 10**5000, True)
ARGUMENTS = {
    "ALFWorld": ("max_steps", "max_receptacles", "object_types"),
    "MathTools": ("max_steps", "level", "rounded_digits"),
    "Reasoning": ("max_steps", "level", "rounded_digits"),
    "ReasoningGym": ("max_steps", "level", "seed", "size"),
    "ScienceWorld": ("max_steps",),
    "WebShop": ("max_steps", "num_prev_actions", "num_prev_obs", "price_seed", "products", "searches"),
}


class Coin(MultiTurnEnv):
    def problems(self, split: str) -> list[str]:
        return ["heads"]

    def start(self, problem: Any) -> str:
        return "toss"

    def act(self, action: str) -> tuple[str, float, bool]:
        return "over", 1.0, True


@pytest.mark.parametrize("value", SENSELESS, ids=lambda value: str(type(value)))
def test_a_number_outside_its_bounds_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tosses: .*, wanted a whole number of at least 2 and at most 9$"):
        whole_number("tosses", value, 2, 9)
    with pytest.raises(ConfigError, match=r"^share: .*, wanted a number of more than 0 and less than 1$"):
        real_number("share", value, 0, 1)
    with pytest.raises(ConfigError, match=r"^max_steps: .*, wanted a whole number of at least 1 and"):
        Coin(max_steps=value)
    with pytest.raises(ConfigError, match=r"^max_steps: .*, wanted a whole number of at least 1 and"):
        OneStepEnv({"train": [{"prompt": "?"}]}, lambda problem, reply: 0.0, max_steps=value)


@pytest.mark.parametrize(
    ("env", "argument"), [(env, argument) for env, names in ARGUMENTS.items() for argument in names]
)
def test_so_are_the_arguments_of_the_environments_that_come_along(env: str, argument: str) -> None:
    for value in (-1, 1e308, math.nan, math.inf, "", [3], int("7" * 400)):
        with pytest.raises(ConfigError, match=f"^{argument}: .*wanted "):
            make(f"agentrl/{env}-v0", **{argument: value})


@pytest.mark.parametrize("name", ["seconds", "memory_mb", "file_mb", "open_files", "threads", "output_chars"])
def test_so_are_the_limits_of_the_sandbox(name: str) -> None:
    for value in (-1, 0, 1e308, math.nan, math.inf, "", [3], int("7" * 400)):
        with pytest.raises(ConfigError, match=rf"^limits\.{name} is .*above 0 and at most \d+$"):
            Limits(**{name: value})


def test_a_configuration_is_told_the_whole_path() -> None:
    config = config_from_tree({"env": {"id": "agentrl/Reasoning-v0", "kwargs": {"max_steps": -3}}})
    with pytest.raises(ConfigError, match=r"^env\.kwargs\.max_steps: -3, wanted "):
        environment_factory(config)()
    with pytest.raises(ConfigError, match=r"^max_steps: -3, wanted "):
        Factory("agentrl/Reasoning-v0", max_steps=-3)()
