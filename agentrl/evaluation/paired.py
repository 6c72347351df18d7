"""Paired differences of policies that played the same tasks, with intervals over tasks and an exact test."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, trim_mean

from agentrl.data.trajectory import Episode
from agentrl.evaluation.statistics import Interval, wilson

Outcomes = Mapping[str, float]  # task -> share of its plays that succeeded; NaN where all were aborted

RESAMPLES = 10_000
TRIMMED_SHARE = 0.25  # share of the seeds that is trimmed at each end


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of a policy to a baseline on the same tasks.

    Args:
        mean: The mean over tasks of the policy's value minus the baseline's; None without a common task.
        interval: Its 95 % interval.
        tasks: The number of tasks where both have a value.
        gained: The number of tasks where the policy's value is higher.
        lost: The number of tasks where it is lower.
        p_value: The p-value of `mcnemar` for these two counts.
    """

    mean: float | None
    interval: Interval
    tasks: int
    gained: int
    lost: int
    p_value: float


def task_means(episodes: Iterable[Episode]) -> Outcomes:
    """Return for each task the share of its plays that succeeded; NaN where all plays were aborted."""
    plays: dict[str, list[bool]] = defaultdict(list)
    for episode in episodes:
        plays[episode.task] += [] if episode.stop.aborted else [episode.success]
    return {task: fmean(each) if each else float("nan") for task, each in plays.items()}


def task_differences(outcomes: Outcomes, baseline: Outcomes) -> NDArray[np.float64]:
    """Return [N], the differences to a baseline by task in sorted order; NaN where either is."""
    return np.array([outcomes[task] - baseline[task] for task in sorted(outcomes)])


def paired_difference(outcomes: Outcomes, baseline: Outcomes) -> PairedDifference:
    """Estimate a difference from tasks that both played.

        mean over tasks n of d[n],   d[n] = outcomes[n] - baseline[n]

    The interval is the percentile bootstrap over tasks. If all N differences are the same d, resampling
    cannot vary. Then, by Wilson's interval of 0 of N, at most a share u of tasks differs from d, and the
    interval is [(1 - u) d - u, (1 - u) d + u].

    Args:
        outcomes: The policy's value of each task, in [0, 1]; tasks with NaN are left out.
        baseline: The baseline's value of the same tasks.
    """
    values = task_differences(outcomes, baseline)
    values = values[~np.isnan(values)]
    tasks, gained, lost = len(values), int((values > 0).sum()), int((values < 0).sum())
    estimate = interquartile_mean(values[None])
    if estimate is None:
        return PairedDifference(None, (-1.0, 1.0), 0, 0, 0, 1.0)
    mean, interval = estimate
    if np.ptp(values) == 0:
        _, others = wilson(0, tasks)
        interval = (1 - others) * mean - others, (1 - others) * mean + others
    return PairedDifference(mean, interval, tasks, gained, lost, mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

        p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c))

    Of b + c tasks that only one of two policies solves, each is as likely b's as c's if neither policy is
    better. Where tasks are played several times, b and c count the tasks with a higher and a lower share of
    successes, and the test is the sign test over tasks; plays of one task are not independent.

    Args:
        gained: b, in number of tasks.
        lost: c, in number of tasks.

    Source: McNemar 1947, Psychometrika 12, 153-157.

    >>> mcnemar(5, 0), mcnemar(0, 0)
    (0.0625, 1.0)
    """
    return float(binomtest(min(gained, lost), gained + lost).pvalue) if gained + lost else 1.0


def interquartile_mean(
    outcomes: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, Interval] | None:
    """Compute the interquartile mean over seeds of the means over tasks, with its 95 % percentile interval.

        trim_mean(x, 0.25),   x[s] = mean over tasks n of outcomes[s, n]

    A resample draws the N tasks with replacement, with one draw for all seeds: they play the same panel, and
    a task that is hard for one seed is hard for the others. Seeds are not resampled, so that the interval
    covers the choice of tasks only.

    Args:
        outcomes: [S, N], in any unit. NaN is left out of its seed's mean, and a seed of only NaN altogether.
            For a paired difference, the outcomes of one method minus those of the other.
        seed: The seed of the resampling.
        resamples: The number of resampled panels.

    Returns:
        The mean and its interval, which has no width if all tasks are alike; None without any outcome.

    Source: Agarwal et al. 2021, arXiv:2108.13264, for the mean; there, runs are resampled instead of tasks.
    """
    known = ~np.isnan(outcomes)
    outcomes = outcomes[known.any(axis=1)]
    if not outcomes.size:
        return None
    value = float(_interquartile(*outcomes, axis=-1))
    if outcomes.shape[1] < 2:  # resampling a single task cannot vary
        return value, (value, value)
    with catch_warnings():
        simplefilter("ignore", RuntimeWarning)  # a resample of only aborted tasks is NaN, and left out
        drawn = bootstrap(
            tuple(outcomes),
            _interquartile,
            paired=True,
            n_resamples=resamples,
            batch=max(1, 10**6 // outcomes.size),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = np.nanquantile(drawn.bootstrap_distribution, [0.025, 0.975])
    return value, (float(low), float(high))


def _interquartile(*outcomes: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    means: NDArray[np.float64] = trim_mean([np.nanmean(each, axis=axis) for each in outcomes], TRIMMED_SHARE)
    return means
