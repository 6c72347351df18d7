"""BAPO: bounds that widen until positive advantages have their part of the update."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs
from agentrl.algorithms.methods.bapo import BAPO, gradient_share, surrogate_balance
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.stack import build_stack
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
DOUBLE = torch.float64
RATIOS = [0.5, 0.7, 1.0, 1.4, 1.1, 0.8]
ADVANTAGES = [-1.0, -1.0, 1.0, 1.0, 1.0, -1.0]


def mini_batch(ratios: Sequence[float], advantages: Sequence[float]) -> MiniBatch:
    """One token of each ratio and advantage, each in an episode of its own."""
    turn = Turn("o", "a", prompt_ids=(1,), action_ids=(2,), new_sequence=True)
    names = [f"e{number}" for number in range(len(ratios))]
    episodes = tuple(Episode(name, "env", "t", 0, (turn,), StopReason.TERMINATED) for name in names)
    batch = collate([Group("t", episodes)])
    zeros = torch.zeros(batch.tokens.shape, dtype=DOUBLE)
    new, credit = zeros.clone(), zeros.clone()
    # Below by less than rounding can add, so that a ratio on a bound is not above it.
    new[:, 1] = torch.tensor(ratios, dtype=DOUBLE).log() - 1e-15
    credit[:, 1] = torch.tensor(advantages, dtype=DOUBLE)
    return MiniBatch(replace(batch, old_logprobs=zeros), credit, Outputs(new, zeros))


def bounds_of(algorithm: Algorithm, mini: MiniBatch) -> tuple[Any, Any]:
    bounds = build_objective(mini, algorithm, Context()).bounds
    assert bounds is not None
    return bounds.lower, bounds.upper


def values(measure: Any, pairs: Sequence[tuple[float, float]]) -> list[float]:
    rows = torch.tensor([RATIOS, ADVANTAGES], dtype=DOUBLE)
    return [measure(*rows, Bounds(*pair)) for pair in pairs]


@pytest.mark.vector("zoo:1.17")
def test_the_balance_of_the_released_code_falls_with_the_lower_bound() -> None:
    lowers = [(lower, 1.2) for lower in (0.6, 0.65, 0.7, 0.75, 0.8)]
    found = values(surrogate_balance, lowers)
    assert found == pytest.approx([1.571429, 1.534884, 1.5, 1.434783, 1.375], abs=5e-7)
    assert values(surrogate_balance, [(0.8, 1.4), (0.8, 2.0)]) == pytest.approx([1.458333] * 2, abs=5e-7)


@pytest.mark.vector("zoo:1.17")
def test_the_released_search_goes_to_both_ends_and_misses_a_target_of_1_6() -> None:
    released = BAPO(preset="released", base=build_recipe("grpo"), target=1.6)
    assert bounds_of(released.build(), mini_batch(RATIOS, ADVANTAGES)) == (0.8, 2.0)
    # A target below the first balance, 1.571429, leaves the first bounds.
    assert bounds_of(replace(released, target=1.57).build(), mini_batch(RATIOS, ADVANTAGES)) == (0.6, 1.2)


@pytest.mark.vector("zoo:1.17")
def test_the_share_of_what_has_a_gradient_rises_with_both_bounds() -> None:
    found = values(gradient_share, [(0.6, 1.2), (0.75, 1.2), (0.75, 1.4)])
    assert found == pytest.approx([0.583333, 0.724138, 0.813953], abs=5e-7)


@pytest.mark.vector("zoo:1.17")
@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (0.0, (0.6, 1.2)),
        (0.58, (0.6, 1.2)),  # met by .583333
        (0.59, (0.75, 1.2)),  # at .7 the ratio of .7 still counts
        (0.8, (0.75, 1.4)),
        (0.9, (0.75, 3.0)),  # never met
    ],
)
def test_the_lower_bound_rises_first_and_then_the_upper_one(build: Build, target: float, wanted: Any) -> None:
    algorithm = build("bapo", lower=[0.6, 0.75], target=target)
    # A ratio on a bound is not clipped: .7 as printed, with 1e-15 less it is below.
    mini = mini_batch([0.5, 0.7 + 1e-12, *RATIOS[2:]], ADVANTAGES)
    assert bounds_of(algorithm, mini) == wanted


def test_equal_sides_meet_a_target_of_a_half_however_they_are_rounded() -> None:
    third = 1 / 3
    for noise in (1e-8, -1e-8):
        mini = mini_batch([1.0] * 6, [third + noise] * 3 + [-third] * 3)
        assert bounds_of(BAPO().build(), mini) == (0.6, 1.2)


def test_without_negative_advantages_the_first_bounds_stay() -> None:
    for contribution in ("gradient", "surrogate"):
        recipe = BAPO(contribution=contribution, target=1.0)
        assert bounds_of(recipe.build(), mini_batch([0.7, 1.1], [1.0, 0.5])) == (0.6, 1.2)


def test_the_dual_clip_is_that_of_the_base_and_takes_its_tokens_out_of_the_balance() -> None:
    mini = mini_batch([1.0, 4.0], [1.0, -1.0])
    dual = BAPO(base=build_recipe("grpo", {"dual_clip": 3.0}))
    bounds = build_objective(mini, dual.build(), Context()).bounds
    assert bounds == Bounds(0.6, 1.2, 3.0)
    assert bounds_of(BAPO().build(), mini) == (0.9, 3.0)


def test_tokens_outside_the_surrogate_do_not_count() -> None:
    def all_but_first(mini: MiniBatch, context: Context) -> torch.Tensor:
        return (mini.batch.trajectory > 0)[:, None].expand_as(mini.batch.tokens)

    mini = mini_batch([1.0, 1.0], [-1.0, 1.0])
    algorithm = BAPO(target=0.9).build()
    masked = build_objective(mini, replace(algorithm, masks=(all_but_first,)), Context()).bounds
    assert masked == Bounds(0.6, 1.2)
    assert build_objective(mini, algorithm, Context()).bounds == Bounds(0.9, 3.0)


@pytest.mark.parametrize("method", ["gspo", "dr_bot", "dapo", "kl_cov"])
@pytest.mark.parametrize("between", [[], ["clip_cov"]], ids=["directly", "below another clip"])
def test_what_would_replace_its_bounds_is_refused(method: str, between: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=f"{method}: it would replace the bounds that base '(bapo|clip_cov)'"
    ):
        build_stack({"compose": ["grpo", "bapo", *between, method]})


@pytest.mark.parametrize("method", ["dr_bot", "dapo"])
def test_it_finds_the_bounds_over_a_base_with_fixed_ones(method: str) -> None:
    mini = mini_batch([1.0, 1.0], [-1.0, 1.0])
    recipe = build_stack({"compose": ["grpo", method, {"name": "bapo", "target": 0.9}]})
    assert bounds_of(recipe.build(), mini) == (0.9, 3.0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target": 1.1}, "wanted a share of at most 1"),
        ({"lower": [0.9, 0.6]}, "wanted the first bound first"),
        ({"upper": [3.0, 1.2]}, "wanted the first bound first"),
        ({"base": {"name": "behaviour_cloning"}}, "'behaviour_cloning' has no clipped ratio"),
        ({"base": {"name": "gspo"}}, "those of single tokens"),
    ],
)
def test_what_contradicts_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_recipe("bapo", settings)
