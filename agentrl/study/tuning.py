"""The choice among the values of a method's knob, from runs on the tuning seeds alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from agentrl.run.records import read_summary
from agentrl.study.runs import StudyRun
from agentrl.study.settings import Setting

RULE = "the value with the highest mean sampled success over the tuning seeds; of equal ones the method's own"


@dataclass(frozen=True)
class Tuning:
    """Success of a method's settings on the tuning seeds.

    Args:
        settings: The settings; the method's own comes first.
        scores: The sampled success rate by setting and tuning seed, of the runs that have finished.
        chosen: The setting that was chosen; None while a run is missing.
    """

    settings: Sequence[Setting]
    scores: Mapping[str, Mapping[int, float]]
    chosen: Setting | None

    @property
    def started(self) -> bool:
        """Return whether any run has finished."""
        return any(self.scores.values())

    @property
    def sentence(self) -> str:
        """Return the choice and its reasons as one line."""
        own = self.settings[0]
        rates = "; ".join(
            f"{one.label}{' (own)' if one.default else ''}: "
            + ("/".join(f"{100 * rate:.1f}" for rate in self.scores[one.name].values()) or "–")
            + (f", mean {100 * fmean(self.scores[one.name].values()):.1f} %" if self.scores[one.name] else "")
            for one in self.settings
        )
        verdict = "not chosen yet" if self.chosen is None else f"chosen: {self.chosen.label}"
        return f"{own.method}: {verdict} ({rates})"

    def as_tree(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "chosen": self.chosen and self.chosen.name,
            "sentence": self.sentence,
            "scores": {
                one.name: {str(seed): rate for seed, rate in self.scores[one.name].items()}
                for one in self.settings
            },
        }


def tune(settings: Sequence[Setting], runs: Sequence[StudyRun]) -> Tuning:
    """Choose a setting by `RULE`.

    Args:
        settings: The settings of a method; its own comes first.
        runs: Their runs on the tuning seeds.
    """
    scores: dict[str, dict[int, float]] = {one.name: {} for one in settings}
    for run in runs:
        if run.finished:
            rate = read_summary(run.folder)["policies"]["trained"]["sampled"]["success_rate"]
            scores[run.name][run.config.seed] = 0.0 if rate is None else rate  # None: all were aborted
    complete = bool(runs) and all(run.finished for run in runs)
    return Tuning(settings, scores, best_setting(settings, scores) if complete else None)


def best_setting(settings: Sequence[Setting], scores: Mapping[str, Mapping[int, float]]) -> Setting:
    """Return the setting with the highest mean score; of equal ones the first, which is the method's own."""
    # Sums of the same numbers in another order can differ in their last digits.
    return max(settings, key=lambda one: round(fmean(scores[one.name].values()), 9))
