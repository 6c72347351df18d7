"""GraphGPO: turns compared by the distance of what they led to from success."""

from collections.abc import Callable
from typing import Any

import pytest
from played import advantages, batch_of, play

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
STEP = [0.577340, 0.707106, 0, 0.577340, -0.707106, -1.154680, 0]
EPISODE = [1.154700] * 3 + [-0.577350] * 4
BOTH = [1.732041, 1.861806, 1.154700, -0.000010, -1.284456, -1.732031, -0.577350]


def example() -> list[Any]:
    """a: s0 -> s1 -> s2 -> success; b: s0 -> s1 -> s3; c: s0 -> s3 -> s3."""
    return [
        play("a", ["s0", "s1", "s2"], 10.0, success=True),
        play("b", ["s0", "s1"], final="s3"),
        play("c", ["s0", "s3"], final="s3"),
    ]


@pytest.mark.vector("2026:4b")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize(("settings", "wanted"), [({}, BOTH), ({"episode_weight": 0.0}, STEP)])
def test_both_levels(build: Build, settings: Any, wanted: Any, layout: Any) -> None:
    algorithm = build("graphgpo", **settings)
    assert advantages(algorithm, batch_of(algorithm, example(), layout=layout)) == pytest.approx(
        wanted, abs=2e-6
    )


@pytest.mark.vector("2026:4b")
def test_the_episode_s_level_is_grpo() -> None:
    algorithm = build_recipe("graphgpo", {"step_weight": 0.0}).build()
    assert advantages(algorithm, batch_of(algorithm, example())) == pytest.approx(EPISODE, abs=2e-6)


def test_a_group_without_success_has_no_step_part() -> None:
    algorithm = build_recipe("graphgpo").build()
    batch = batch_of(algorithm, [play("a", "xy", 0.0, final="z"), play("b", "xx", 0.0, final="y")])
    assert advantages(algorithm, batch) == [0] * 4


def test_progress_is_measured_against_the_state_itself() -> None:
    algorithm = build_recipe(
        "graphgpo", {"progress": True, "episode_weight": 0.0, "divide_by_std": False}
    ).build()
    # In s0 with d = 3: 10 * .1^0 twice, and to s3 with d = 4 10 * .1^2; in s1 10 and 10 * .1^3.
    wanted = [3.3, 4.995, 0, 3.3, -4.995, -6.6, 0]
    assert advantages(algorithm, batch_of(algorithm, example())) == pytest.approx(wanted, abs=1e-9)


def test_similar_observations_have_no_key_of_the_state() -> None:
    with pytest.raises(ConfigError, match="wanted 1 with state=state_key"):
        build_recipe("graphgpo", {"similarity": 0.95, "state": "state_key"})
