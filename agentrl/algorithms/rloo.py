"""RLOO: the mean return of the others in the group is the baseline."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.grpo import GRPO, ClippedRecipe, Weighting, compare_in_groups
from agentrl.algorithms.recipe import recipe


@recipe("rloo")
@dataclass(frozen=True)
class RLOO(ClippedRecipe):
    """REINFORCE with a leave-one-out baseline: each return is compared with the mean of the others.

    `parity: official` sets row weighting and raw singletons, as in `grpo`.

    Args:
        weighting: as in `grpo`.
        singleton: likewise.

    The other fields are those of `ClippedRecipe`.

    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """

    OFFICIAL: ClassVar[Mapping[str, Any]] = GRPO.OFFICIAL

    weighting: Weighting = "trajectory"
    singleton: functional.Singleton = "zero"

    def build(self) -> Algorithm:
        advantage = partial(
            compare_in_groups,
            estimate=partial(functional.leave_one_out_advantage, singleton=self.singleton),
            weighting=self.weighting,
            invalid_penalty=self.invalid_penalty,
        )
        return replace(super().build(), advantage=advantage)
