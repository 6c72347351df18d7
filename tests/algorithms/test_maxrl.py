"""MaxRL: centred returns over the mean."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn

Build = Callable[..., Algorithm]


def advantages(
    algorithm: Algorithm, returns: Sequence[float], invalid: Sequence[int] = (), layout: Any = "trajectory"
) -> list[float]:
    """The advantage of each episode; its two turns share it. The first turn of those named is invalid."""
    episodes = []
    for number, reward in enumerate(returns):
        first = Turn("o", "a", (1,), (2,), (-0.5,), new_sequence=True, valid=number not in invalid)
        last = Turn("o", "a", (1,), (2,), (-0.5,), reward=reward)
        episodes.append(Episode(f"e{number}", "env", "t", 0, (first, last), StopReason.TERMINATED))
    batch = prepare(algorithm, [Group("t", tuple(episodes))], Context(), layout=layout, selected=True)
    found = compute_advantages(algorithm, batch, Context())
    each = [found[batch.trajectory == owner] for owner in range(len(episodes))]
    assert all(len(set(values[values != 0].tolist())) <= 1 for values in each)
    return [float(values.sum()) / 2 for values in each]


@pytest.mark.vector("2026:10b")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize(
    ("returns", "wanted"), [([1, 0, 0, 1], [1, -1, -1, 1]), ([1, 0, 0, 0], [3, -1, -1, -1])]
)
def test_a_rare_success_counts_most(build: Build, returns: Any, wanted: Any, layout: Any) -> None:
    assert advantages(build("maxrl"), returns, layout=layout) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.vector("2026:10b")
def test_grpo_gives_the_same_group_less() -> None:
    found = advantages(build_recipe("grpo").build(), [1, 0, 0, 0])
    assert found == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_where_the_mean_is_one_it_is_dr_grpo() -> None:
    found, plain = (advantages(build_recipe(name).build(), [2, 0, 1]) for name in ("maxrl", "dr_grpo"))
    assert found == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("returns", [[0, 0], [-1, 1], [-3, 1]])
def test_without_a_positive_mean_nothing_is_learned(returns: list[float]) -> None:
    assert advantages(build_recipe("maxrl").build(), returns) == [0, 0]


def test_penalties_are_in_the_returns_and_not_in_the_mean() -> None:
    algorithm = build_recipe("maxrl", {"invalid_penalty": 2.0}).build()
    # Returns -1, 0, 0, 1 of mean 0; without the penalty 1, 0, 0, 1 of mean 0.5.
    found = advantages(algorithm, [1, 0, 0, 1], invalid=[0])
    assert found == pytest.approx([-2, 0, 0, 2], abs=1e-6)


def test_an_episode_alone_teaches_nothing_or_its_raw_return() -> None:
    assert advantages(build_recipe("maxrl").build(), [3]) == [0]
    assert advantages(build_recipe("maxrl", {"preset": "released"}).build(), [3]) == [3]
