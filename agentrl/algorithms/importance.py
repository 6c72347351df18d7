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
    """Return an algorithm that weights its action tokens by importance.

    Args:
        algorithm: Any algorithm.
        cap: The upper limit of the weights, see `truncated_importance`; None returns the algorithm as it is.
    """
    if cap is None:
        return algorithm
    return replace(
        algorithm,
        weights=(*algorithm.weights, partial(importance_weights, cap=cap)),
        diagnostics=(*algorithm.diagnostics, partial(capped_share, cap=cap)),
    )


@requires("old_logprobs")
def importance_weights(mini: MiniBatch, context: Context, *, cap: float) -> Tensor:
    """Return the truncated importance of each action token, 1 elsewhere; [B, T].

    See `functional.truncated_importance`.
    """
    batch = mini.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    weights = functional.truncated_importance(old, batch.logprobs, cap)
    return torch.where(batch.action_mask, weights, 1.0)


@requires("old_logprobs")
def capped_share(rollout: MiniBatch, context: Context, *, cap: float) -> Mapping[str, float]:
    """Measure the share of action tokens whose importance weight the cap limits: mismatch/capped."""
    batch = rollout.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")[batch.action_mask]
    if not len(old):
        return {}
    return {"mismatch/capped": float(((old - batch.logprobs[batch.action_mask]).exp() > cap).float().mean())}
