"""Comparison of the methods of a study, with confidence intervals over tasks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from agentrl.data.storage import read_episodes
from agentrl.errors import ConfigError
from agentrl.evaluation.paired import (
    RESAMPLES,
    TRIMMED_SHARE,
    Outcomes,
    interquartile_mean,
    task_differences,
    task_means,
)
from agentrl.evaluation.statistics import wilson
from agentrl.run.folder import evaluated_episodes, open_run
from agentrl.run.logger import read_metrics
from agentrl.run.records import read_summary

Tree = Mapping[str, Any]
Folders = Mapping[int, Mapping[str, Path]]  # seed -> method -> its finished run

DECODINGS = ("greedy", "sampled")
CURVES = (
    "train/rollout/entropy/token",
    "train/rollout/entropy/trajectory",
    "train/rollout/success_rate",
)
VERDICTS = ("alike", "lower", "higher")  # what a difference to the baseline says
_MAX_POINTS = 40  # of a curve


def compare(folders: Folders, methods: Sequence[str], baseline: str, clone: str) -> dict[str, Any]:
    """Compare the finished runs of a study.

    Args:
        folders: The folders of the finished runs, by seed and method.
        methods: The methods, in the order in which they are shown.
        baseline: The method that the others are compared with.
        clone: The name of the runs that the methods started from.

    Returns:
        JSON values: `methods` (each with its `runs` by seed; per decoding, the interquartile mean over seeds
        and the paired difference to the baseline; and the success while `training`), `alike`, `lower` and
        `higher` (see `verdict`), `baseline`, `clone`, `panel`, `caption`, `warnings`.

    Raises:
        ConfigError: If two runs were evaluated on different panels.
    """
    names = [name for name in (clone, *methods) if any(name in found for found in folders.values())]
    runs = {
        name: {seed: _run_record(found[name]) for seed, found in folders.items() if name in found}
        for name in names
    }
    panel = _common_panel(runs)
    compared: dict[str, Any] = {
        name: {"runs": {str(seed): run for seed, run in runs[name].items()}} for name in names
    }
    for decoding in DECODINGS:
        plays = {
            name: {seed: _read_outcomes(folders[seed][name], decoding) for seed in runs[name]}
            for name in names
        }
        for name in names:
            compared[name][decoding] = _success_estimate(plays[name])
            if name != baseline:
                compared[name][decoding]["difference"] = _difference(plays[name], plays.get(baseline, {}))
    for name in names:
        compared[name]["training"] = _training_success(
            runs[name], runs.get(baseline, {}), own=name == baseline
        )
    others = [name for name in names if name not in (baseline, clone)]
    verdicts = {name: verdict(compared[name]["sampled"]["difference"]) for name in others}
    return {
        "baseline": baseline,
        "clone": clone,
        "panel": panel,
        "methods": compared,
        **{found: [name for name in others if verdicts[name] == found] for found in VERDICTS},
        "caption": _caption(panel, len(folders)),
        "warnings": _warnings({name: runs.get(name, {}) for name in methods}, folders),
    }


def verdict(difference: Tree | None) -> str | None:
    """Say whether a paired difference tells a method from the baseline.

    Args:
        difference: The difference, as `compare` returns it.

    Returns:
        `lower` or `higher` if both 95 % intervals, that over games and that over seeds, lie on this side of
        0; else `alike`. None without both of them.
    """
    if not difference or not difference["interval"] or not difference["over_seeds"]:
        return None
    ends = (*difference["interval"], *difference["over_seeds"]["interval"])
    return "lower" if max(ends) < 0 else "higher" if min(ends) > 0 else "alike"


def spread_over_seeds(differences: Sequence[float]) -> dict[str, Any] | None:
    """Compute the mean of paired differences, one for each seed, with its 95 % t-interval.

        mean d +- t(0.975, S - 1) * sd / sqrt(S)

    The interval is for the mean over all seeds, on the same tasks. It takes the differences of the seeds as
    independent and normally distributed.

    Args:
        differences: The difference of each seed, in any unit.

    Returns:
        `mean`, `sd` and `interval`; None for fewer than two seeds.
    """
    if len(differences) < 2:
        return None
    mean, deviation = fmean(differences), stdev(differences)
    half = float(t.ppf(0.975, len(differences) - 1)) * deviation / len(differences) ** 0.5
    return {"mean": mean, "sd": deviation, "interval": [mean - half, mean + half]}


def _run_record(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run: its scores, counts and curves."""
    summary = read_summary(folder)
    rows = read_metrics(folder / "metrics.jsonl", "train")
    regular = open_run(folder).config.learner.updates_per_step
    learned = [row for row in rows if "train/learner/updates" in row]
    # Updates beyond the configured number per step were made on replayed episodes.
    replayed = sum(
        max(0.0, row["train/learner/updates"] + row["train/learner/skipped_updates"] - regular)
        for row in learned
    )
    trained = summary["policies"]["trained"]
    return {
        "panel": summary["panel"],
        "episodes": round(sum(row["train/rollout/episodes"] for row in rows)),
        "updates": round(sum(row["train/learner/updates"] for row in learned) - replayed),
        "replay_updates": round(replayed),
        "taught_tokens": _total(learned, "train/learner/taught_tokens"),
        "effective_episodes": _total(learned, "train/learner/effective_episodes"),
        "success": {decoding: trained[decoding]["success_rate"] for decoding in DECODINGS}
        | {"training": _mean([row.get("train/rollout/success_rate") for row in rows])},
        "aborted": {
            "training": round(
                sum(row["train/rollout/aborted_rate"] * row["train/rollout/episodes"] for row in rows)
            ),
            **{decoding: trained[decoding]["aborted"] for decoding in DECODINGS},
        },
        "cpu_seconds": round(
            sum(summary["times"].get(f"{name}.cpu", 0.0) for name in ("rollout", "learning")), 1
        ),
        "curves": {name: downsample(rows, name) for name in CURVES},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _training_success(runs: Mapping[int, Tree], others: Mapping[int, Tree], *, own: bool) -> dict[str, Any]:
    """Return the mean success while training, and unless `own` the difference to that of the same seeds."""
    rates = {seed: run["success"]["training"] for seed, run in runs.items()}
    theirs = {seed: run["success"]["training"] for seed, run in others.items()}
    found: dict[str, Any] = {
        "value": _mean(rates.values()),
        "by_seed": {str(seed): rate for seed, rate in rates.items()},
    }
    if not own:
        common = [
            rate - other
            for seed, rate in rates.items()
            if rate is not None and (other := theirs.get(seed)) is not None
        ]
        found["difference"] = {"value": _mean(common), "over_seeds": spread_over_seeds(common)}
    return found


def _total(rows: Sequence[Tree], key: str) -> int | None:
    """Return the sum of a metric over the steps that learned; None for a run that did not log it."""
    known = [row[key] for row in rows if key in row]
    return round(sum(known)) if known or not rows else None


def downsample(rows: Sequence[Tree], key: str, points: int = _MAX_POINTS) -> dict[str, list[float]]:
    """Return a logged metric as at most `points` means, each over the same number of consecutive steps.

    >>> downsample([{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)], "loss", points=2)
    {'step': [1.5, 3.5], 'value': [1.5, 3.5]}
    """
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    width = max(1, ceil(len(known) / points))
    windows = [known[first : first + width] for first in range(0, len(known), width)]
    return {
        "step": [fmean(step for step, _ in window) for window in windows],
        "value": [fmean(value for _, value in window) for window in windows],
    }


def _read_outcomes(folder: Path, decoding: str) -> Outcomes:
    return task_means(read_episodes(evaluated_episodes(folder, "trained", decoding), turns=False))


def _success_estimate(plays: Mapping[int, Outcomes]) -> dict[str, Any]:
    table = np.array([[found[task] for task in sorted(found)] for found in plays.values()])
    tasks = table.shape[1]
    score = _estimate(plays, table)
    if score["value"] in (0.0, 1.0):  # all outcomes are alike, so that resampling cannot vary
        score["interval"] = list(wilson(round(score["value"] * tasks), tasks))
    return score


def _difference(plays: Mapping[int, Outcomes], others: Mapping[int, Outcomes]) -> dict[str, Any] | None:
    """Estimate the paired difference over tasks and common seeds; None without a common seed."""
    common = [seed for seed in plays if seed in others]
    if not common:
        return None
    table = np.array([task_differences(plays[seed], others[seed]) for seed in common])
    found = _estimate(common, table)
    return found | {"over_seeds": spread_over_seeds([d for d in found["by_seed"].values() if d is not None])}


def _estimate(seeds: Iterable[int], table: NDArray[np.float64]) -> dict[str, Any]:
    value, interval = interquartile_mean(table) or (None, None)
    means = (None if np.isnan(row).all() else float(np.nanmean(row)) for row in table)
    by_seed = {str(seed): mean for seed, mean in zip(seeds, means, strict=True)}
    return {"value": value, "interval": interval and list(interval), "by_seed": by_seed}


def _common_panel(runs: Mapping[str, Mapping[int, Tree]]) -> dict[str, Any] | None:
    """Return the panel that all runs were evaluated on; None without any run."""
    panels = {
        f"seed-{seed}/{name}": run["panel"] for name, found in runs.items() for seed, run in found.items()
    }
    first = next(iter(panels), None)
    other = [name for name, panel in panels.items() if panel != panels[first or name]]
    if other:
        raise ConfigError(
            f"{first} was evaluated on panel {panels[first or '']}, but {other[0]} on {panels[other[0]]}: "
            "their scores cannot be compared"
        )
    return None if first is None else panels[first]


def _caption(panel: Tree | None, seeds: int) -> list[str]:
    if panel is None:
        return []
    cut = int(TRIMMED_SHARE * seeds)
    dropped = f"the {cut} lowest and the {cut} highest" if cut else "none, so that it is the mean"
    return [
        "success: interquartile mean over seeds of the success rate, "
        f"scipy.stats.trim_mean(x, {TRIMMED_SHARE}); of {seeds} values it drops {dropped} "
        f"(int({TRIMMED_SHARE} * {seeds}) = {cut} at each end).",
        f"[ ]: 95 % percentile bootstrap. Each of {RESAMPLES:,} resamples draws the {panel['tasks']} tasks "
        f"of panel {panel['hash'][:12]} ({panel['split']}) with replacement, one draw for all seeds and "
        "methods, since all play the same tasks; rates and their interquartile mean are recomputed from it. "
        "Seeds are not resampled: an interval covers the choice of tasks, not the choice of seeds. It is not "
        "corrected for the number of methods. If all plays had the same outcome, it is Wilson's interval.",
        "difference over games: the outcome minus that of the baseline on the same seed and task, where "
        "neither was aborted; interquartile mean and interval as above, in percentage points.",
        "difference over seeds: the mean of the seeds' differences with its 95 % t-interval, which covers "
        "the choice of seeds on these games. A method is told from the baseline if both intervals of its "
        "sampled difference lie on the same side of 0.",
        "while training: the mean over steps of the success of a step's episodes, of as many different tasks "
        "as groups were played, and its difference over seeds. It is less noisy than the panel, but later "
        "steps count as much as early ones, and a method that branches starts from states of its choice.",
        "taught tokens: action tokens in the policy loss whose advantage is not 0, each counted once, summed "
        "over the steps. effective episodes: (sum w)^2 / sum w^2 of a step's episodes, where w is an "
        "episode's mean |advantage| over its tokens in the loss, summed over the steps: the number of "
        "equally weighted episodes that would average out as much noise. Neither counts replayed episodes. "
        "Both are means over seeds.",
        "updates: optimizer steps on a step's own episodes; those on replayed episodes are listed as "
        "replayed. CPU: seconds of rollout and learning in the run's own process, mean over seeds.",
    ]


def _warnings(runs: Mapping[str, Mapping[int, Tree]], seeds: Collection[int]) -> list[str]:
    none = [name for name, by_seed in runs.items() if not by_seed]
    found = [f"no run of {', '.join(none)} has finished"] if none else []
    found += [
        f"{name}: {len(by_seed)} of {len(seeds)} seeds finished, not "
        + ", ".join(str(seed) for seed in seeds if seed not in by_seed)
        for name, by_seed in runs.items()
        if 0 < len(by_seed) < len(seeds)
    ]
    for key in ("episodes", "updates"):
        counts = {name: {run[key] for run in by_seed.values()} for name, by_seed in runs.items() if by_seed}
        if len(set().union(*counts.values())) > 1:
            listed = ", ".join(f"{name} {format_range(values)}" for name, values in counts.items())
            found.append(f"runs differ in {key}: {listed}")
    return found


def format_range(counts: Collection[int]) -> str:
    """Format the lowest and the highest of some counts, or one number if they are equal.

    >>> format_range([1200, 1200]), format_range([7, 5, 6])
    ('1,200', '5–7')
    """
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
