"""Decisions that somebody else drew: how far off, and how much they count."""

import math
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import mismatch_metrics
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.importance import capped_share, importance_weights, with_importance_correction
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import ConfigError

CONTEXT = Context(0, 1, {})
DRAWN = (-0.5, -2.0, -1.0)


def batch(old: tuple[float, ...]) -> Batch:
    """One reply of three decisions, with what the learner says of them."""
    turn = Turn("o", "a", (1, 2), (5, 6, 7), DRAWN, (1.0, 1.0, 1.0), new_sequence=True)
    episode = Episode("e", "env", "t", 0, (turn,), StopReason.TERMINATED)
    found = collate([Group("t", (episode,))])
    return replace(found, old_logprobs=torch.tensor([[0.0, 0.0, *old]]), old_entropies=found.entropies)


def mini(found: Batch) -> MiniBatch:
    return MiniBatch(found, torch.zeros_like(found.logprobs))


def test_weights_are_probabilities_of_the_learner_over_those_of_who_drew_up_to_the_cap() -> None:
    old = (-0.5 + math.log(1.5), -2.0 + math.log(8.0), -1.0 + math.log(0.25))
    weights = importance_weights(mini(batch(old)), CONTEXT, cap=2.0)
    assert weights.tolist() == [pytest.approx([1.0, 1.0, 1.5, 2.0, 0.25], abs=1e-6)]


def test_where_nothing_was_sampled_the_weight_is_1_whatever_stands_there() -> None:
    found = batch(DRAWN)
    assert found.old_logprobs is not None
    found.old_logprobs[0, :2] = float("nan")
    assert importance_weights(mini(found), CONTEXT, cap=2.0).tolist() == [pytest.approx([1.0] * 5, abs=1e-6)]


def test_mismatch_is_measured_in_nats_and_as_a_divergence() -> None:
    numbers = mismatch_metrics(sample := mini(batch((-0.5, -1.5, -2.0))), CONTEXT)
    assert numbers["mismatch/mean"] == pytest.approx(0.5)
    assert numbers["mismatch/max"] == pytest.approx(1.0)
    # k3 of KL(rollout || old): exp(d) - 1 - d with d = old - rollout = 0, 0.5, -1
    k3 = (math.exp(0.5) - 1.5 + math.exp(-1)) / 3
    assert numbers["mismatch/kl"] == pytest.approx(k3, abs=1e-6)
    assert capped_share(sample, CONTEXT, cap=1.2) == {"mismatch/capped": pytest.approx(1 / 3)}


def test_without_a_cap_the_algorithm_stays_as_it_is() -> None:
    base = GRPO().build()
    watched = with_importance_correction(base, None)
    assert watched is base
    assert (watched.reads_scores, with_importance_correction(base, 2.0).reads_scores) == (
        base.reads_scores,
        True,
    )


def test_the_default_cap_is_left_out_where_the_method_corrects_the_mismatch_itself() -> None:
    grpo, dppo = GRPO().build(), build_recipe("dppo").build()
    assert len(with_importance_correction(grpo, None, default=2.0).weights) == 1
    assert with_importance_correction(dppo, None, default=2.0) is dppo
    with pytest.raises(ConfigError, match=r"wanted trainer\.importance_cap=null"):
        with_importance_correction(dppo, 2.0)


def test_the_truncation_is_that_of_the_ratio() -> None:
    old, drawn = torch.tensor([[-1.0, -1.0]], requires_grad=True), torch.tensor([[-1.5, -0.5]])
    weights = functional.truncated_importance(old, drawn, 1.1)
    assert weights.tolist() == [pytest.approx([1.1, math.exp(-0.5)])]
    assert not weights.requires_grad
