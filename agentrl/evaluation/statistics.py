"""Success rates with confidence intervals for single and repeated plays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from scipy.stats import binomtest

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rate:
    """Success rate with its 95 % interval; without any episode they are None and [0, 1].

    Example: Rate(0.5, (0.299, 0.701), episodes=20).
    """

    success_rate: float | None
    interval: Interval
    episodes: int


@dataclass(frozen=True, slots=True)
class TaskMean:
    """Mean of a number over tasks with its 95 % interval; without any task they are None and [0, 1]."""

    mean: float | None
    interval: Interval
    tasks: int


def wilson(successes: int, trials: int) -> Interval:
    """Compute Wilson's 95 % score interval of a proportion; it is [0, 1] without trials.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_over_tasks(
    plays: Sequence[Sequence[bool]], *, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Compute the 95 % percentile interval of the pooled success rate by resampling whole tasks.

    Plays of one task are not independent, so K plays of N tasks say less than K·N tasks would.

    Args:
        plays: The outcomes of each task; tasks without any are left out.
        seed: The seed of the resampling.
        resamples: The number of resampled panels.

    Returns:
        The interval, or Wilson's over the number of tasks if all tasks have the same rate.
    """
    wins = [sum(outcomes) for outcomes in plays if outcomes]
    counts = [len(outcomes) for outcomes in plays if outcomes]
    return _bootstrap_ratio(wins, counts, seed, resamples)


def _bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int, resamples: int
) -> Interval:
    """Compute the 95 % percentile interval of sum(numerators) / sum(denominators) over resampled tasks."""
    wins, counts = np.array(numerators, dtype=float), np.array(denominators, dtype=float)
    if not len(wins):
        return 0.0, 1.0
    if len(wins) == 1 or np.ptp(wins / counts) == 0:
        return wilson(round(len(wins) * float(wins.sum() / counts.sum())), len(wins))
    draws = np.random.default_rng(seed)
    # A resampled panel is represented by how often it contains each task.
    held = draws.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=resamples)
    low, high = np.quantile((held @ wins) / (held @ counts), [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(plays: int, successes: int, k: int) -> float:
    """Estimate the probability that at least one of k plays of a task succeeds.

        pass@k = 1 - C(n - c, k) / C(n, k),   n plays with c successes

    It is unbiased for k <= n.

    Source: Chen et al. 2021, arXiv:2107.03374.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - comb(plays - successes, k) / comb(plays, k)


def pass_hat_k(plays: int, successes: int, k: int) -> float:
    """Estimate the probability that all of k plays of a task succeed.

        pass^k = C(c, k) / C(n, k),   n plays with c successes

    It is unbiased for k <= n.

    Source: Yao et al. 2024, arXiv:2406.12045.

    >>> pass_hat_k(4, 3, 2)
    0.5
    """
    return comb(successes, k) / comb(plays, k)


def pass_rate(
    plays: Sequence[Sequence[bool]], k: int, estimate: Callable[[int, int, int], float]
) -> TaskMean:
    """Average `pass_at_k` or `pass_hat_k` over tasks, with a bootstrap over tasks.

    Args:
        plays: The outcomes of each task's plays, without aborted plays. Tasks with fewer than k are left out.
        k: The number of plays.
        estimate: The estimator of a task.
    """
    values = [estimate(len(task), sum(task), k) for task in plays if len(task) >= k]
    if not values:
        return TaskMean(None, (0.0, 1.0), 0)
    interval = _bootstrap_ratio(values, [1] * len(values), seed=0, resamples=10_000)
    return TaskMean(sum(values) / len(values), interval, len(values))


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, … up to `most`.

    >>> powers_of_two(6)
    [1, 2, 4]
    """
    return [1 << power for power in range(most.bit_length())]


def success_rate(plays: Sequence[Sequence[bool]]) -> Rate:
    """Pool the plays of all tasks into one rate.

    The interval is Wilson's if no task was played twice, and else a bootstrap over tasks.

    Args:
        plays: The outcomes of each task's plays, True for success, without aborted plays.
    """
    outcomes = [outcome for task in plays for outcome in task]
    if not outcomes:
        return Rate(None, (0.0, 1.0), 0)
    rate = sum(outcomes) / len(outcomes)
    repeated = any(len(task) > 1 for task in plays)
    interval = bootstrap_over_tasks(plays) if repeated else wilson(sum(outcomes), len(outcomes))
    return Rate(rate, interval, len(outcomes))


def intervals_separate(a: Interval, b: Interval) -> bool:
    """Return whether one interval lies strictly above the other."""
    return a[0] > b[1] or b[0] > a[1]
