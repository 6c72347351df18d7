"""GiGPO: beside whole episodes, turns that acted in the same state are compared with each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Advantage, Algorithm, Context, MiniBatch
from agentrl.algorithms.grpo import GRPO
from agentrl.algorithms.recipe import recipe
from agentrl.algorithms.steps import anchor_states, branch_shares, turn_exists, turn_rewards
from agentrl.data.batch import Batch


@recipe("gigpo")
@dataclass(frozen=True)
class GiGPO(GRPO):
    """Group-in-group policy optimisation: the advantage of the episode plus that of the turn in its state.

        A = A_episode + step_weight * A_step

    where A_episode is that of `grpo` and A_step is the discounted return from a turn on, compared with those
    of all turns of the group that acted in the same state. In episodes of one turn both are the same, and
    step_weight only scales them: leave it at 0 there. Groups of equal returns are kept, since their turns may
    still differ. `parity: official` is that of `grpo`, for A_episode.

    Args:
        step_weight: of A_step.
        gamma: discount from one turn to the next.
        similarity: below 1, observations of at least this `difflib` ratio are the same state.
        divide_by_std: False is the paper's mode mean_norm, for both terms; True its mean_std_norm.

    The other fields are those of `grpo`.

    Source: Feng et al. 2025, arXiv:2505.10978.
    """

    drop_equal_groups: bool = False
    step_weight: float = 1.0
    gamma: float = 0.95
    similarity: float = 1.0

    def build(self) -> Algorithm:
        plain = super().build()
        step = partial(
            step_advantage, gamma=self.gamma, divide_by_std=self.divide_by_std, similarity=self.similarity
        )
        advantage = partial(
            two_level_advantage, episode=plain.advantage, step=step, step_weight=self.step_weight
        )
        numbers = partial(level_numbers, episode=plain.advantage, step=step, similarity=self.similarity)
        return replace(plain, advantage=advantage, diagnostics=(*plain.diagnostics, numbers))

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (self.step_weight < 0, f"step_weight is {self.step_weight}, wanted at least 0"),
            (not 0 <= self.gamma <= 1, f"gamma is {self.gamma}, wanted within [0, 1]"),
            (not 0 < self.similarity <= 1, f"similarity is {self.similarity}, wanted above 0, at most 1"),
        ]


def two_level_advantage(
    batch: Batch, context: Context, *, episode: Advantage, step: Advantage, step_weight: float
) -> Tensor:
    """The sum of both levels; [B, T]."""
    return episode(batch, context) + step_weight * step(batch, context)


def step_advantage(
    batch: Batch, context: Context, *, gamma: float, divide_by_std: bool, similarity: float
) -> Tensor:
    """Compare the discounted return from each turn on with those of the turns in the same state; [B, T].

    Every visit to a state counts, also a second one of the same trajectory, and one in which there was
    nothing to decide. A turn that several branches share was played once: each of their returns counts by
    its share. A state that was visited once gives 0.
    """
    exists = turn_exists(batch)
    returns = functional.discounted_returns(turn_rewards(batch), exists, gamma=gamma)
    compared = torch.zeros_like(returns)
    compared[exists] = functional.group_relative_advantage(
        returns[exists],
        anchor_states(batch, similarity=similarity)[exists],
        divide_by_std=divide_by_std,
        copies=branch_shares(batch)[exists],
    )
    return functional.spread_steps(compared, batch.turns, batch.trajectory, batch.sampled)


def level_numbers(
    mini: MiniBatch, context: Context, *, episode: Advantage, step: Advantage, similarity: float
) -> Mapping[str, float]:
    """How much each level says, and the share of turns whose state other turns visited as well."""
    batch = mini.batch
    states = anchor_states(batch, similarity=similarity)
    _, visits = states[states >= 0].unique(return_counts=True)  # type: ignore[no-untyped-call]
    visited = int(visits.sum())
    return {
        "advantage_episode": _mean_size(episode(batch, context), batch),
        "advantage_step": _mean_size(step(batch, context), batch),
        "states_shared": int(visits[visits > 1].sum()) / visited if visited else 0.0,
    }


def _mean_size(advantages: Tensor, batch: Batch) -> float:
    return float(functional.masked_mean(advantages.abs(), batch.sampled))
