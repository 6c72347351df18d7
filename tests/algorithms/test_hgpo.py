"""HGPO: turns compared by what they share of their past."""

from collections.abc import Callable
from typing import Any

import pytest
from played import advantages, batch_of, play

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
PAPER = [0.3325, 0.444444, -0.617499, -0.555555, 0.285, 0, 0.333333]
# The weights 2 and 3 of the released code change those of the second turns.
CODE = [0.3325, 0.433333, -0.617499, -0.566667, 0.285, 0, 0.333333]


def example() -> list[Any]:
    return [
        play("a", ["s0", "g"], 1.0, success=True),
        play("b", ["s0", "g"]),
        play("c", ["s0", "y", "g"], 1.0, success=True),
    ]


@pytest.mark.vector("2026:4a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize(("settings", "wanted"), [({}, PAPER), ({"offset": 2}, CODE)])
def test_the_levels_are_averaged(build: Build, settings: Any, wanted: Any, layout: Any) -> None:
    algorithm = build("hgpo", history=1, divide_by_std=False, **settings)
    batch = batch_of(algorithm, example(), layout=layout)
    assert advantages(algorithm, batch) == pytest.approx(wanted, abs=2e-6)


def test_without_history_it_is_the_step_part_of_gigpo() -> None:
    settings = {"divide_by_std": False}
    hgpo = build_recipe("hgpo", {"history": 0, **settings}).build()
    gigpo, grpo = (build_recipe(name, settings).build() for name in ("gigpo", "grpo"))
    found, both, episode = (advantages(each, batch_of(each, example())) for each in (hgpo, gigpo, grpo))
    assert found == pytest.approx([a - b for a, b in zip(both, episode, strict=True)], abs=1e-12)


def test_the_std_is_that_of_the_population() -> None:
    algorithm = build_recipe("hgpo", {"history": 0}).build()
    batch = batch_of(algorithm, [play("a", "x", 1.0), play("b", "x", 0.0)])
    assert advantages(algorithm, batch) == pytest.approx([1, -1], abs=1e-5)


def test_with_the_episode_and_no_state_twice_it_is_grpo() -> None:
    episodes = [play("a", "xy", 1.0), play("b", "zw", 0.0), play("c", "uv", 0.0)]
    hgpo = build_recipe("hgpo", {"episode": True, "offset": 2}).build()
    grpo = build_recipe("grpo").build()
    found, wanted = (advantages(each, batch_of(each, episodes)) for each in (hgpo, grpo))
    assert found == pytest.approx(wanted, abs=1e-12)
    plain = build_recipe("hgpo").build()
    assert advantages(plain, batch_of(plain, episodes)) == [0] * 6


def test_a_level_that_is_zero_is_left_out_in_the_released_form_only() -> None:
    # In state g the returns are 1, 0 and .5: the last is the mean. Those with the past s are .5 and 0.
    episodes = [play("a", ["r", "g"], 1.0), play("b", ["s", "g"], 0.0), play("c", ["s", "g"], 0.5)]
    settings = {"history": 1, "divide_by_std": False, "offset": 1}
    ours, released = (
        build_recipe("hgpo", {**settings, **more}).build() for more in ({}, {"preset": "released"})
    )
    assert advantages(ours, batch_of(ours, episodes))[-1] == pytest.approx(0.25 * 2 / 3, abs=1e-12)
    assert advantages(released, batch_of(released, episodes))[-1] == pytest.approx(0.25, abs=1e-12)


def test_an_episode_without_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="offset is 1 and gives the episode no weight, wanted at least 2"):
        build_recipe("hgpo", {"episode": True})
