"""RLOO: a leave-one-out baseline, the mean return of the other episodes of the group."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.methods.grpo import GRPO, Weighting, compare_in_groups, mark_comparing
from agentrl.algorithms.recipe import Presets, recipe


@recipe("rloo")
@dataclass(frozen=True)
class RLOO(ClippedRecipe):
    """REINFORCE with a leave-one-out baseline: each return is compared with the mean of the others.

        A[i] = R[i] - mean of R[j],   over the other episodes j of the group

        field             | paper      | released   | ours
        dual_clip         | null       | 3.0        | null
        aggregation       | constant   | token      | sequence
        sequence          | turn       | trajectory | trajectory
        sequence_length   | 1          | null       | null
        drop_equal_groups | false      | false      | true
        weighting         | trajectory | row        | trajectory
        singleton         | zero       | raw        | zero

    The paper treats a whole reply as one action, and so sums over the tokens of a turn. It has neither ratio
    nor clip, which make no difference with one update per batch. The released code is verl-agent.

    Args:
        weighting: As in `grpo`.
        singleton: As in `grpo`.

    The remaining fields are those of `ClippedRecipe`.

    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"aggregation": "constant", "sequence": "turn", "sequence_length": 1},
        "released": {"weighting": "row", "singleton": "raw"},
    }
    OFFICIAL: ClassVar[Collection[str]] = GRPO.OFFICIAL

    weighting: Weighting = "trajectory"
    singleton: functional.Singleton = "zero"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        advantage = partial(
            compare_in_groups,
            estimate=partial(functional.leave_one_out_advantage, singleton=self.singleton),
            weighting=self.weighting,
            invalid_penalty=self.invalid_penalty,
        )
        return replace(super().build(), advantage=mark_comparing(advantage, self.singleton))
