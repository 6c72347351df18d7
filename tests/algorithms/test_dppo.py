"""DPPO: bounds of a token's probability."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_rows import loss_and_slopes, rows, with_ratios

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.importance import with_importance_correction
from agentrl.algorithms.methods.dppo import DPPO, bernoulli_kl, kl_bounds
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})
FREE = [0.5, 1, 1.5, -0.5, -1, -1.5]


@pytest.mark.vector("2026:10a")
def test_a_frequent_token_is_held_and_a_rare_one_is_free(build: Build) -> None:
    algorithm = build("dppo", base=TOKEN_MEAN, delta=0.15)
    _, _, slopes = loss_and_slopes(algorithm, with_ratios(0.4))
    assert slopes == pytest.approx([0.5, 1, 0, 0, -1, -1.5], abs=1e-6)
    _, _, slopes = loss_and_slopes(algorithm, with_ratios(0.01))
    assert slopes == pytest.approx(FREE, abs=1e-6)


def test_ratios_are_relative_to_the_sampler() -> None:
    mini = rows([[math.log(0.3)]], [[math.log(0.3)]], [[1.0]], sampled=[[math.log(0.25)]])
    assert loss_and_slopes(DPPO(base=TOKEN_MEAN).build(), mini)[2] == pytest.approx([1.2], abs=1e-6)
    assert loss_and_slopes(DPPO(base=TOKEN_MEAN, delta=0.04).build(), mini)[2] == [0]


def test_the_edges_of_the_bernoulli_divergence_are_at_delta() -> None:
    sampled = torch.tensor([1e-9, 0.01, 0.4, 0.9], dtype=torch.float64)
    lower, upper = kl_bounds(sampled, delta=0.05)
    assert (lower < sampled).all()
    assert (upper > sampled).all()
    for edge in (lower[1:], upper):
        found = bernoulli_kl(sampled[-len(edge) :], edge)
        assert found.tolist() == pytest.approx([0.05] * len(edge), abs=1e-9)
    assert float(lower[0]) == pytest.approx(0, abs=1e-15)  # it may vanish: the divergence stays below delta
    one = torch.ones(1, dtype=torch.float64)
    assert [float(edge) for edge in kl_bounds(one, delta=0.05)] == pytest.approx([math.exp(-0.05), 1])


def test_the_divergence_may_be_kl() -> None:
    algorithm = DPPO(base=TOKEN_MEAN, divergence="kl", delta=0.05).build()
    # KL(.4 || .6) = .081, KL(.4 || .2) = .105, KL(.4 || .5) = .020
    _, _, slopes = loss_and_slopes(algorithm, with_ratios(0.4, (0.5, 1.25, 1.5)))
    assert slopes == pytest.approx([0.5, 1.25, 0, 0, -1.25, -1.5], abs=1e-6)


def test_the_released_loss_draws_every_token_towards_the_sampler() -> None:
    recipe = DPPO(preset="released", log_ratio_coefficient=0.1)
    assert DPPO(preset="released").log_ratio_coefficient == 1e-3
    mini = with_ratios(0.4, (1.6,), 1.0)
    _, _, slopes = loss_and_slopes(recipe.build(), mini)
    assert slopes == pytest.approx([-0.1 * 2 * math.log(1.6)], abs=1e-6)  # beyond its bound


def test_with_delta_one_and_the_learner_as_sampler_nothing_is_clipped() -> None:
    _, _, slopes = loss_and_slopes(DPPO(base=TOKEN_MEAN, delta=1.0).build(), with_ratios(0.4))
    assert slopes == pytest.approx(FREE, abs=1e-6)


def test_the_mismatch_is_not_corrected_twice() -> None:
    with pytest.raises(ConfigError, match="the importance already"):
        with_importance_correction(DPPO().build(), 2.0)


@pytest.mark.parametrize(
    ("name", "base", "reason"),
    [
        ("dppo", "gspo", "it would replace the ratio of base 'gspo'"),
        ("dppo", "cispo", "'cispo' has no clipped ratio"),
        ("gspo", "dppo", "it would replace the bounds"),
        ("dapo", "dppo", "it would replace the bounds"),
        ("cispo", "dppo", "it would replace the bounds"),
    ],
)
def test_two_losses_are_refused(name: str, base: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_recipe(name, {"base": {"name": base}})
