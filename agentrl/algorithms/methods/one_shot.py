"""1-shot RLVR: an entropy bonus, and learning from the tasks whose accuracy varies most."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any, ClassVar

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import entropy_bonus
from agentrl.algorithms.hooks import Context, MiniBatch, Select, Term
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import OptionalCount, SignedWeight
from agentrl.data.trajectory import Group
from agentrl.errors import CheckpointError


@recipe("one_shot")
@dataclass(frozen=True)
class OneShot(Recipe):
    """1-shot RLVR: an entropy bonus, and the policy learns from a few tasks of varying accuracy.

        loss  = that of the base - entropy_coefficient * mean of H over the action tokens
        score = population std over steps of a task's rate of success;   the `tasks` highest are learned from

    For `warmup` steps all groups are learned from and rates are recorded; after that only the groups of the
    chosen tasks. With `tasks` 0 nothing is chosen. Without both it is its base.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.kl_coefficient | 0.001 | 0.001    | 0.0

    The paper records rates in a run of its own and then repeats the first task to fill a batch of 128, with
    groups of 8, a temperature of 0.6 and a learning rate of 1e-6. Here both happen in one run, and tasks that
    are not chosen are still played; give the environment the chosen task to save that.

    Args:
        base: The recipe whose loss this adds to, and that selects among the chosen groups.
        entropy_coefficient: The coefficient of the bonus, in loss units per nat.
        tasks: The number of tasks to learn from after the warm-up; 0 for all.
        warmup: The number of steps in which rates are recorded.

    Source: Wang et al. 2025, arXiv:2504.20571.
    """

    KIND = "entropy"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        preset: {"base": {"name": "grpo", "preset": preset, "kl_coefficient": 0.001}}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    entropy_coefficient: SignedWeight = 0.001
    tasks: OptionalCount = 0
    warmup: OptionalCount = 50

    def build(self) -> Algorithm:
        """Build the base with the bonus and the choice of tasks."""
        base = self.base.build()
        if self.entropy_coefficient:
            bonus = Term(
                "one_shot_entropy", entropy_bonus, -self.entropy_coefficient, functional.token_weights
            )
            base = replace(base, terms=(*base.terms, bonus))
        if not self.tasks:
            return base
        history = SuccessRates(self.tasks, self.warmup, base.select)
        diagnostics = (*base.diagnostics, history.metrics)
        return replace(
            base, select=history.select, stateful=(*base.stateful, history), diagnostics=diagnostics
        )


class SuccessRates:
    """Rates of success of each task over the steps, and the tasks in which they vary most.

    Args:
        tasks: How many tasks are chosen.
        warmup: The number of steps before that.
        base: The selection among the groups of the chosen tasks.
    """

    name = "success_rates"

    def __init__(self, tasks: int, warmup: int, base: Select) -> None:
        self._tasks, self._warmup, self._base = tasks, warmup, base
        self._rates: dict[str, list[float]] = {}

    def ranking(self) -> list[str]:
        """Return the tasks by falling deviation of their rates, then by name."""
        return sorted(self._rates, key=lambda task: (-pstdev(self._rates[task]), task))

    def select(self, groups: Sequence[Group], context: Context) -> Sequence[Group]:
        """Return all groups during the warm-up, and then those of the chosen tasks that the base keeps."""
        if context.step < self._warmup:
            return groups
        chosen = set(self.ranking()[: self._tasks])
        return self._base([group for group in groups if group.task in chosen], context)

    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Record the rate of success of each task of a step of the warm-up."""
        if context.step >= self._warmup:
            return
        found: dict[str, list[float]] = defaultdict(list)
        for episode in rollout.batch.episodes:
            found[episode.task].append(float(episode.success))
        for task, outcomes in found.items():
            self._rates.setdefault(task, []).append(fmean(outcomes))

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the number of tasks with recorded rates, and the largest deviation."""
        deviations = [pstdev(rates) for rates in self._rates.values()]
        return {"one_shot/tasks": len(deviations), "one_shot/largest_deviation": max(deviations, default=0.0)}

    def state_dict(self) -> dict[str, Any]:
        """Return the rates by task."""
        return {"rates": {task: list(rates) for task, rates in self._rates.items()}}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore the rates."""
        rates = state.get("rates")
        if not isinstance(rates, Mapping):
            raise CheckpointError(f"the state of {self.name} holds {sorted(state)}, wanted rates by task")
        self._rates = {task: list(values) for task, values in rates.items()}
