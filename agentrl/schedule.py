"""Schedules as pure functions of the training step."""

import math
from typing import Literal

PenaltySchedule = Literal["constant", "exponential", "official_epoch", "ramp"]


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
    return floor + (1 - floor) * _half_cosine(_progress(step, total))


def cosine_warmup(step: int, steps: int) -> float:
    """Increase from 0 at step 0 to 1 at step `steps` along half a cosine; always 1 if `steps` is 0.

    (1 - cos(pi * step / steps)) / 2

    >>> [round(cosine_warmup(step, 4), 6) for step in (0, 1, 2, 4, 9)]
    [0.0, 0.146447, 0.5, 1.0, 1.0]
    """
    return 1 - cosine(step, steps + 1, floor=0.0) if steps else 1.0


def cosine_restarts(step: int, total: int, *, cycles: int, warmup: int) -> float:
    """Increase linearly from 0 to 1 over `warmup` steps, then fall from 1 to 0 `cycles` times.

    Each fall is half a cosine:

    (1 + cos(pi * (cycles * (step - warmup) / (total - warmup) mod 1))) / 2

    >>> [round(cosine_restarts(step, 10, cycles=2, warmup=2), 6) for step in (0, 1, 2, 4, 5, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.146447, 1.0, 0.0]
    """
    if step < warmup:
        return step / warmup
    if step >= total:
        return 0.0
    return _half_cosine(cycles * (step - warmup) / (total - warmup) % 1.0)


def penalty_weight(kind: PenaltySchedule, step: int, total: int, *, midpoint: float, rate: float) -> float:
    """Return the weight of a penalty at a step of `total` steps, by the name of a schedule (EPO).

        constant        1
        exponential     1 + exp(-rate * step / mid),   mid = midpoint * total
        ramp            min(1, step / mid)
        official_epoch  `two_piece_decay`

    >>> [penalty_weight("ramp", step, 100, midpoint=0.6, rate=1.0) for step in (0, 15, 60, 99)]
    [0.0, 0.25, 1.0, 1.0]
    """
    match kind:
        case "exponential":
            return 1 + math.exp(-rate * step / (midpoint * total))
        case "official_epoch":
            return two_piece_decay(step, total)
        case "ramp":
            return min(1.0, step / (midpoint * total))
        case _:
            return 1.0


def two_piece_decay(step: int, total: int) -> float:
    """Fall slowly in the first half, fast in the second, then stay constant, as the released code of EPO.

        half = total // 2
        1 - 0.2 (1 - exp(-2 step / half))                    up to half
        0.8 exp(-3 (step - half) / (total - half))           after it

    >>> [round(two_piece_decay(step, 150), 6) for step in (0, 75, 76, 150)]
    [1.0, 0.827067, 0.768632, 0.03983]
    """
    half = total // 2
    if step == 0:
        return 1.0
    if step <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (min(step, total) - half) / (total - half))


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _progress(step: int, total: int) -> float:
    return min(1.0, max(0.0, step / (total - 1))) if total > 1 else 0.0
