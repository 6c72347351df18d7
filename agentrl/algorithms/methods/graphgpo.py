"""GraphGPO: a turn is worth how near it came to success on the graph of all turns of the group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import turn_exists, turns_to_tokens
from agentrl.algorithms.hooks import Context, requires
from agentrl.algorithms.methods.gigpo import level_metrics, two_level_advantage
from agentrl.algorithms.methods.grpo import GRPO, mark_comparing
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.algorithms.states import State
from agentrl.config import PositiveShare, Weight
from agentrl.data.batch import Batch


@recipe("graphgpo")
@dataclass(frozen=True)
class GraphGPO(GRPO):
    """Graph-based group policy optimisation: turns compared by their distance from success on a graph.

        A      = episode_weight A_episode + step_weight A_step
        A_step = (R - mean R) / (std R + 1e-6),   R = 10 gamma^d(next state),   over all turns of the group in
                 the same state

    A_episode is the advantage of `grpo`. The states of a group are the nodes of a graph and its turns the
    edges; the last turn of a successful episode leads to success, and d is the least number of turns from a
    state to it, by any episode; from a state that never led there, the largest d plus 1. A state that was
    visited once gives 0, and so does a group without success. Transitions are taken to be deterministic, and
    observations to be states. With step_weight 0 it is GRPO.

        field             | paper      | released | ours
        dual_clip         | null       | 3.0      | null
        aggregation       | sequence   | token    | sequence
        kl_coefficient    | 0.01       | 0.0      | 0.0
        invalid_penalty   | 0.1        | 0.0      | 0.0
        drop_equal_groups | false      | false    | false
        weighting         | trajectory | row      | trajectory
        singleton         | zero       | raw      | zero

    In the paper the exponent is d + 1, a constant factor, which shows only without the std. gamma is 0.1 for
    ALFWorld, 0.2 for WebShop; the runs have groups of 8.

    Args:
        step_weight: The weight of A_step.
        episode_weight: The weight of A_episode.
        gamma: The discount of the distance.
        progress: Whether the exponent is d(next state) - d(state) + 1, an option of the released code, which
            is 0 on a shortest path.
        similarity: As in `gigpo`; the released code merges states from 0.95 on, as an option.
        state: As in `gigpo`. States by `state_key` have no key after the last turn, where the text is used.
        divide_by_std: False is mean_norm, for both terms; True is mean_std_norm.

    The remaining fields are those of `grpo`.

    Source: arXiv:2605.26684.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {"paper": {"kl_coefficient": 0.01, "invalid_penalty": 0.1}}

    drop_equal_groups: bool = False
    step_weight: Weight = 1.0
    episode_weight: Weight = 1.0
    gamma: PositiveShare = 0.1
    progress: bool = False
    similarity: PositiveShare = 1.0
    state: State = "observation"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        by = self.state if self.similarity == 1 else self.similarity
        states, distances = f"states:{by}", f"success_distance:{by}"
        step = partial(
            distance_advantage,
            states=states,
            distances=distances,
            gamma=self.gamma,
            progress=self.progress,
            divide_by_std=self.divide_by_std,
        )
        declared = requires(states, distances, "branch_weights")
        advantage = partial(
            two_level_advantage,
            episode=plain.advantage,
            step=step,
            step_weight=self.step_weight,
            episode_weight=self.episode_weight,
        )
        numbers = partial(level_metrics, episode=plain.advantage, step=step, states=states)
        return replace(
            plain,
            advantage=mark_comparing(declared(advantage), self.singleton),
            diagnostics=(*plain.diagnostics, declared(numbers)),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.similarity < 1 and self.state == "state_key",
                f"similarity is {self.similarity} and compares observations, wanted 1 with state=state_key",
            ),
        ]


def distance_advantage(
    batch: Batch,
    context: Context,
    *,
    states: str,
    distances: str,
    gamma: float,
    progress: bool,
    divide_by_std: bool,
) -> Tensor:
    """Compare the turns of each state by the distance from success of the state they led to; [B, T] float64.

    `states` and `distances` are the features that number the states and tell their distances.
    """
    exists, away = turn_exists(batch), feature_of(batch, distances).double()
    exponent = away[:, 1:] - away[:, :-1] + 1 if progress else away[:, 1:]
    values = torch.zeros_like(exponent)
    values[exists] = functional.group_relative_advantage(
        10 * gamma ** exponent[exists],
        feature_of(batch, states)[exists],
        divide_by_std=divide_by_std,
        copies=feature_of(batch, "branch_weights")[exists],
    )
    return turns_to_tokens(values, batch)
