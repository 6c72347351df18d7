"""A method whose own part is switched off is its base: same losses, same gradients, same weights."""

from typing import Any

import pytest
import torch
from toy_policy import ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.batch import collate
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(
    step=3, total_steps=10, history={"train/algorithm/entropy/turn/00": [0.1] * 6}, vocabulary=13
)

GRPO: dict[str, Any] = {"name": "grpo"}
REDUCTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epo, no entropy": ({"name": "epo", "entropy_coefficient": 0.0}, GRPO),
    "epo over gigpo": (
        {"name": "epo", "entropy_coefficient": 0.0, "base": {"name": "gigpo"}},
        {"name": "gigpo"},
    ),
    "gigpo, no step term": (
        {"name": "gigpo", "step_weight": 0.0},
        {"name": "grpo", "drop_equal_groups": False},
    ),
    "aepo, plain clip": (
        {"name": "aepo", "entropy_advantage": 0.0, "stop_gradient_clip": False, "branch": False},
        GRPO,
    ),
    "spear, no replay": (
        {"name": "spear", "coefficient": 0.0, "covariance_share": 0.0, "tool_reward": 0.0, "base": GRPO},
        GRPO,
    ),
    "spear over gigpo": (
        {
            "name": "spear",
            "coefficient": 0.0,
            "covariance_share": 0.0,
            "tool_reward": 0.0,
            "base": {"name": "gigpo"},
        },
        {"name": "gigpo"},
    ),
    "dapo, equal clips": (
        {"name": "dapo", "clip_low": 0.2, "clip_high": 0.2},
        {"name": "grpo", "aggregation": "token"},
    ),
    "steer, equal weights": ({"name": "steer", "low": 1.0, "high": 1.0}, GRPO),
    "steer over gigpo, exponential": (
        {"name": "steer", "low": 1.0, "exponential": True, "base": {"name": "gigpo"}},
        {"name": "gigpo"},
    ),
    "bapo, fixed bounds": ({"name": "bapo", "lower": [0.8, 0.8], "upper": [1.2, 1.2]}, GRPO),
    "bapo, first bounds": ({"name": "bapo", "lower": [0.8, 0.9], "upper": [1.2, 3.0], "target": 0.0}, GRPO),
    "canon, both comparisons": ({"name": "canon", "mix": 0.5}, {"name": "dr_grpo"}),
}


def built(block: dict[str, Any]) -> Algorithm:
    return build_recipe(block["name"], {key: value for key, value in block.items() if key != "name"}).build()


def trained(algorithm: Algorithm) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Two updates of two optimiser steps each, from the same policy, with ratios away from 1."""
    config = LearnerConfig(
        optimizer="adamw", learning_rate=0.3, warmup_steps=0, mini_batches=3, micro_batch_tokens=40
    )
    learner = Learner(ToyPolicy(), config, forward=toy_forward())
    numbers = [
        learner.update(prepare(algorithm, make_groups(seed), CONTEXT), algorithm, CONTEXT) for seed in (0, 1)
    ]
    return numbers, torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_with_its_own_part_switched_off_a_method_is_its_base(name: str) -> None:
    method, base = (built(block) for block in REDUCTIONS[name])
    batch = collate(make_groups(0))
    batch = Learner(ToyPolicy(), LearnerConfig(), forward=toy_forward()).score(batch)
    one, other = (compute_advantages(algorithm, batch, CONTEXT) for algorithm in (method, base))
    assert other.any()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    (numbers, weights), (base_numbers, base_weights) = trained(method), trained(base)
    torch.testing.assert_close(weights, base_weights, rtol=0, atol=1e-12)
    for found, wanted in zip(numbers, base_numbers, strict=True):
        assert wanted["learner/clip_ratio"] > 0
        for key in ("learner/loss", "learner/policy_loss", "learner/grad_norm", "learner/clip_ratio"):
            assert found[key] == pytest.approx(wanted[key], abs=1e-12), key


@pytest.mark.parametrize(
    "switch_on",
    [
        {"name": "epo", "entropy_coefficient": 0.1},
        {"name": "gigpo"},
        {"name": "aepo", "stop_gradient_clip": False, "branch": False},
        {"name": "aepo", "entropy_advantage": 0.0, "branch": False},
        {"name": "spear", "coefficient": 0.0, "tool_reward": 0.0, "base": GRPO,
         "covariance_share": 0.2, "covariance_band": [0.001, 9.0]},
        {"name": "spear", "covariance_share": 0.0, "tool_reward": 0.0, "base": GRPO,
         "buffer_size": 1, "warmup": 0},
        {"name": "dapo"},
        {"name": "bapo", "lower": [0.8, 0.95], "upper": [1.2, 2.0], "target": 0.7},
        {"name": "canon"},
        {"name": "kl_cov"},
        {"name": "steer"},
        {"name": "steer", "exponential": True},
        {"name": "steer", "metric": "exact"},
    ],
)  # fmt: skip
def test_switched_on_it_is_not(switch_on: dict[str, Any]) -> None:
    bases = {"dapo": {"name": "grpo", "aggregation": "token"}, "canon": {"name": "dr_grpo"}}
    base = bases.get(switch_on["name"], GRPO)
    assert (trained(built(switch_on))[1] - trained(built(base))[1]).abs().max() > 1e-6


def test_empg_without_modulation_is_its_base_less_the_mean_over_turns() -> None:
    method = built({"name": "empg", "k": 0.0, "k_future": 0.0, "zeta": 0.0})
    batch = Learner(ToyPolicy(), LearnerConfig(), forward=toy_forward()).score(collate(make_groups(0)))
    one, other = (
        compute_advantages(algorithm, batch, CONTEXT).double() for algorithm in (method, built(GRPO))
    )
    turns = {
        (int(batch.trajectory[row]), int(batch.turns[row, place])): float(other[row, place])
        for row, place in batch.action_mask.nonzero().tolist()
    }
    mean = sum(turns.values()) / len(turns)
    assert abs(mean) > 1e-3
    expected = torch.where(batch.action_mask, other - mean, 0.0)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-7)


def test_kl_cov_without_its_penalty_is_its_base_with_bounds_that_nothing_reaches() -> None:
    method, base = (
        built({"name": "kl_cov", "coefficient": 0.0}),
        built({**GRPO, "clip_low": 1.0, "clip_high": 1e6}),
    )
    (numbers, weights), (base_numbers, base_weights) = trained(method), trained(base)
    torch.testing.assert_close(weights, base_weights, rtol=0, atol=1e-12)
    for found, wanted in zip(numbers, base_numbers, strict=True):
        for key in ("learner/loss", "learner/policy_loss", "learner/grad_norm"):
            assert found[key] == pytest.approx(wanted[key], abs=1e-12), key
    penalised = trained(built({"name": "kl_cov", "share": 0.2}))[1]
    assert (penalised - weights).abs().max() > 1e-3
