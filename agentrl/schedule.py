"""Schedules as pure functions of the training step."""

import math


def warmup(step: int, steps: int) -> float:
    """Increase linearly to 1 over the first `steps` steps: min(1, (step + 1) / steps).

    >>> [warmup(step, 4) for step in (0, 1, 3, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return 1.0 if steps <= 0 else min(1.0, (step + 1) / steps)


def linear(step: int, total: int, start: float, end: float) -> float:
    """Interpolate linearly from `start` at step 0 to `end` at step `total - 1`, clamped outside this range.

    >>> linear(1, 3, 0.0, 1.0)
    0.5
    """
    return start + (end - start) * _progress(step, total)


def cosine(step: int, total: int, floor: float = 0.1) -> float:
    """Decay from 1 at step 0 to `floor` at step `total - 1` along half a cosine.

    floor + (1 - floor) * (1 + cos(pi * step / (total - 1))) / 2

    >>> [round(cosine(step, 3), 6) for step in (0, 1, 2)]
    [1.0, 0.55, 0.1]
    """
    return floor + (1 - floor) * (1 + math.cos(math.pi * _progress(step, total))) / 2


def _progress(step: int, total: int) -> float:
    return min(1.0, max(0.0, step / (total - 1))) if total > 1 else 0.0
