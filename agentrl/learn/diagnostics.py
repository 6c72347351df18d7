"""The numbers to log of an update: means over its optimiser steps, and facts about its batch."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, given


def batch_numbers(rollout: MiniBatch, algorithm: Algorithm, context: Context) -> dict[str, float]:
    """Return the entropies, sizes and diagnostics of a scored rollout batch."""
    batch = rollout.batch
    entropies = functional.entropy_means(
        given(batch.old_entropies, "old_entropies"), batch.sampled, batch.turns, batch.trajectory
    )
    numbers = {f"entropy_{level}": float(value) for level, value in entropies.items()}
    for diagnostic in algorithm.diagnostics:
        numbers |= diagnostic(rollout, context)
    return numbers | {
        "trajectories": float(len(batch.episodes)),
        "tokens": float(batch.lengths.sum()),
        "decisions": float(batch.sampled.sum()),
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
