"""The numbers to log of an update: means over its optimiser steps, and facts about its batch."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor


def diagnose(rollout: MiniBatch, algorithm: Algorithm, context: Context) -> dict[str, float]:
    """Return the metrics of the algorithm's diagnostics.

    Raises:
        ValueError: Two diagnostics report the same name.
    """
    metrics: dict[str, float] = {}
    for diagnostic in algorithm.diagnostics:
        found = diagnostic(rollout, context)
        if twice := sorted(metrics.keys() & found.keys()):
            raise ValueError(
                f"algorithm.diagnostics: two report {', '.join(twice)}, wanted one for each name"
            )
        metrics |= found
    return metrics


def batch_metrics(rollout: MiniBatch) -> dict[str, float]:
    """Return the entropies and sizes of a scored rollout batch, and how much of it teaches."""
    batch = rollout.batch
    entropies = functional.entropy_means(
        require_tensor(batch.old_entropies, "old_entropies"), batch.action_mask, batch.turns, batch.trajectory
    )
    return {f"entropy/{level}": float(value) for level, value in entropies.items()} | {
        "trajectories": float(len(batch.episodes)),
        "tokens": float(batch.lengths.sum()),
        "action_tokens": float(batch.action_mask.sum()),
        **teaching_metrics(rollout),
    }


def teaching_metrics(rollout: MiniBatch) -> dict[str, float]:
    """Measure how many tokens and episodes of a batch the surrogate learns from, and how strongly.

        w_e = mean |A| over the episode's tokens in the mask,   effective episodes = (sum w)^2 / sum w^2

    The effective number of episodes is that of equally weighted episodes whose mean would be as noisy, as
    long as episodes are independent. It is the number of episodes if all |A| are alike, and 0 if all are 0.

    Args:
        rollout: The batch with its final advantages and mask.
    """
    counted, sizes = rollout.counted, rollout.advantages.double().abs()
    taught = counted & (sizes > 0)
    tokens, total = (torch.zeros(len(rollout.batch.episodes), dtype=torch.float64) for _ in range(2))
    owner = rollout.batch.trajectory[:, None].expand_as(counted)[counted].cpu()
    tokens.index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
    total.index_add_(0, owner, sizes[counted].cpu())
    weights = total / tokens.clamp(min=1)
    squares = float((weights**2).sum())
    return {
        "taught_tokens": float(taught.sum()),
        "effective_episodes": float(weights.sum()) ** 2 / squares if squares else 0.0,
        "advantage_size": float(sizes[taught].mean()) if bool(taught.any()) else 0.0,
    }


def step_means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number over the optimiser steps that reported it as finite."""
    found: dict[str, list[float]] = defaultdict(list)
    for numbers in steps:
        for name, value in numbers.items():
            if math.isfinite(value):
                found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def step_counts(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return how many optimiser steps were applied and how many were skipped as not finite."""
    skipped = sum("grad_norm" not in numbers for numbers in steps)
    return {"updates": float(len(steps) - skipped), "skipped_updates": float(skipped)}
