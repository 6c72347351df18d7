"""Mismatch between the policy that sampled the action tokens and the learner, and its correction."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires


def with_importance_correction(algorithm: Algorithm, cap: float | None) -> Algorithm:
    """Return an algorithm that logs the mismatch of its action tokens and weights them by importance.

    Args:
        algorithm: Any algorithm.
        cap: The upper limit of the weights, see `truncated_importance`; None adds no weights.
    """
    weights = () if cap is None else (partial(importance_weights, cap=cap),)
    return replace(
        algorithm,
        weights=(*algorithm.weights, *weights),
        diagnostics=(*algorithm.diagnostics, partial(mismatch_metrics, cap=cap)),
    )


@requires("old_logprobs")
def importance_weights(mini: MiniBatch, context: Context, *, cap: float) -> Tensor:
    """Return the truncated importance of each action token, 1 elsewhere; [B, T].

    See `functional.truncated_importance`.
    """
    batch = mini.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    weights = functional.truncated_importance(old, batch.logprobs, cap)
    return torch.where(batch.sampled, weights, 1.0)


@requires("old_logprobs")
def mismatch_metrics(rollout: MiniBatch, context: Context, *, cap: float | None) -> Mapping[str, float]:
    """Measure the mismatch of learner (before the update) and sampling policy over the action tokens.

    Returns:
        drift_mean and drift_max of |old logprob - rollout logprob| in nats; drift_kl, the k3 estimate of
        KL(rollout || old); and, with a cap, drift_capped, the share of action tokens whose weight it limits.
    """
    batch = rollout.batch
    old, drawn = (
        require_tensor(batch.old_logprobs, "old_logprobs")[batch.sampled],
        batch.logprobs[batch.sampled],
    )
    if not len(old):
        return {}
    gap = (old - drawn).abs()
    numbers = {
        "drift_mean": float(gap.mean()),
        "drift_max": float(gap.max()),
        "drift_kl": float(functional.kl_k3(drawn, old).mean()),
    }
    if cap is not None:
        numbers["drift_capped"] = float(((old - drawn).exp() > cap).float().mean())
    return numbers
