"""Decisions that other weights or another engine drew: how far off they are, and what to do about it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires


def with_importance_correction(algorithm: Algorithm, cap: float | None) -> Algorithm:
    """Have an algorithm log the drift of its decisions, and weigh them by importance.

    Args:
        algorithm: any.
        cap: of the weights, see `truncated_importance`; None weighs nothing.
    """
    weights = () if cap is None else (partial(importance_weights, cap=cap),)
    return replace(
        algorithm,
        weights=(*algorithm.weights, *weights),
        diagnostics=(*algorithm.diagnostics, partial(mismatch_metrics, cap=cap)),
    )


@requires("old_logprobs")
def importance_weights(mini: MiniBatch, context: Context, *, cap: float) -> Tensor:
    """Truncated importance of each decision, 1 elsewhere; [B, T], see `functional.truncated_importance`."""
    batch = mini.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    weights = functional.truncated_importance(old, batch.logprobs, cap)
    return torch.where(batch.sampled, weights, 1.0)


@requires("old_logprobs")
def mismatch_metrics(rollout: MiniBatch, context: Context, *, cap: float | None) -> Mapping[str, float]:
    """How far apart the learner and whoever drew are, before the update, over the decisions of a batch.

    Returns:
        drift_mean and drift_max, of |old logprob - rollout logprob| in nats; drift_kl, the estimate k3 of
        KL(rollout || old); with a cap drift_capped, the share of decisions that it holds.
    """
    batch = rollout.batch
    old, drawn = (
        require_tensor(batch.old_logprobs, "old_logprobs")[batch.sampled],
        batch.logprobs[batch.sampled],
    )
    if not len(old):
        return {}
    apart = (old - drawn).abs()
    numbers = {
        "drift_mean": float(apart.mean()),
        "drift_max": float(apart.max()),
        "drift_kl": float(functional.kl_k3(drawn, old).mean()),
    }
    if cap is not None:
        numbers["drift_capped"] = float(((old - drawn).exp() > cap).float().mean())
    return numbers
