"""GiGPO: besides whole episodes, compare turns that acted in the same state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import turn_exists, turn_penalties, turn_rewards, turns_to_tokens
from agentrl.algorithms.hooks import Advantage, Context, MiniBatch, requires
from agentrl.algorithms.methods.grpo import GRPO, mark_comparing
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.algorithms.states import State, has_state_key
from agentrl.config import PositiveShare, Share, Weight
from agentrl.data.batch import Batch


@recipe("gigpo")
@dataclass(frozen=True)
class GiGPO(GRPO):
    """Group-in-group policy optimisation: the advantage of the episode plus that of the turn in its state.

        A      = A_episode + step_weight * A_step
        A_step = (G - mean G) / std G,   over all turns of the group that acted in the same state

    where A_episode is the advantage of `grpo` and G is the discounted return from a turn on. In episodes of
    one turn both advantages are the same and step_weight only scales them: set it to 0 there. Groups of equal
    returns are kept, since their turns may still differ.

        field             | paper      | released   | ours
        dual_clip         | null       | 3.0        | null
        aggregation       | sequence   | token      | sequence
        sequence          | turn       | trajectory | trajectory
        kl_coefficient    | 0.01       | 0.0        | 0.0
        invalid_penalty   | 0.1        | 0.0        | 0.0
        drop_equal_groups | false      | false      | false
        weighting         | trajectory | row        | trajectory
        singleton         | zero       | raw        | zero

    The paper's loss is a mean over the turns of all episodes. Ours is a mean over episodes first, so that a
    token of a short episode weighs more. kl_coefficient 0.01 and invalid_penalty 0.1 are the paper's settings
    for text games, and those of the released scripts, which ran groups of 8 at a learning rate of 1e-6. The
    preset `released` subtracts a turn's invalid penalty from its own discounted return, and not from those of
    earlier turns.

    Args:
        step_weight: The weight of A_step.
        gamma: The discount from one turn to the next.
        similarity: Below 1, observations with at least this `difflib` ratio are the same state.
        state: What identifies a state: the text of the `observation`, or the environment's
            `info["state_key"]` (`state_key`). Turns without a key use the text; the metric `states_named` is
            the share of turns that have a key. If no turn has one, the first update is refused.
        divide_by_std: False is the paper's mode mean_norm, for both terms; True is its mean_std_norm.

    The remaining fields are those of `grpo`.

    Source: Feng et al. 2025, arXiv:2505.10978.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"sequence": "turn", "kl_coefficient": 0.01, "invalid_penalty": 0.1},
    }

    drop_equal_groups: bool = False
    step_weight: Weight = 1.0
    gamma: Share = 0.95
    similarity: PositiveShare = 1.0
    state: State = "observation"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        states = f"states:{self.state if self.similarity == 1 else self.similarity}"
        step = partial(
            step_advantage,
            states=states,
            gamma=self.gamma,
            divide_by_std=self.divide_by_std,
            late_penalty=self.invalid_penalty if self.preset == "released" else 0.0,
        )
        declared = requires(states, "branch_weights")
        advantage = declared(
            partial(two_level_advantage, episode=plain.advantage, step=step, step_weight=self.step_weight)
        )
        numbers = declared(partial(level_metrics, episode=plain.advantage, step=step, states=states))
        compared = mark_comparing(advantage, self.singleton)
        return replace(plain, advantage=compared, diagnostics=(*plain.diagnostics, numbers))

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.similarity < 1 and self.state == "state_key",
                f"similarity is {self.similarity} and compares observations, wanted 1 with state=state_key",
            ),
        ]


def two_level_advantage(
    batch: Batch,
    context: Context,
    *,
    episode: Advantage,
    step: Advantage,
    step_weight: float,
    episode_weight: float = 1.0,
) -> Tensor:
    """Return the weighted sum of the episode's and the step's advantage; [B, T]."""
    return episode_weight * episode(batch, context) + step_weight * step(batch, context)


def step_advantage(
    batch: Batch,
    context: Context,
    *,
    states: str,
    gamma: float,
    divide_by_std: bool,
    late_penalty: float = 0.0,
) -> Tensor:
    """Compare the discounted return from each turn on with those of the turns in the same state; [B, T].

    `states` is the feature that numbers the states.
    Every visit to a state counts, including repeated visits of a trajectory and turns without action tokens.
    A turn shared by several branches was played once: each branch's return counts with the branch's weight. A
    state that was visited once gives 0. Rewards contain the penalties of invalid actions, so that they reach
    earlier turns; `late_penalty` is their size if they should only reduce the discounted return of their own
    turn.
    """
    exists = turn_exists(batch)
    penalties = turn_penalties(batch, late_penalty)
    returns = functional.discounted_returns(turn_rewards(batch) + penalties, exists, gamma=gamma) - penalties
    compared = torch.zeros_like(returns)
    compared[exists] = functional.group_relative_advantage(
        returns[exists],
        feature_of(batch, states)[exists],
        divide_by_std=divide_by_std,
        copies=feature_of(batch, "branch_weights")[exists],
    )
    return turns_to_tokens(compared, batch)


def level_metrics(
    mini: MiniBatch, context: Context, *, episode: Advantage, step: Advantage, states: str
) -> Mapping[str, float]:
    """Measure the size of each level, and the share of turns whose state was also visited by other turns.

    With state keys, `states_named` is the share of turns that have one.
    """
    batch = mini.batch
    numbers = feature_of(batch, states)
    _, visits = numbers[numbers >= 0].unique(return_counts=True)  # type: ignore[no-untyped-call]
    visited = int(visits.sum())
    named = has_state_key(batch).sum() / max(1, visited)
    return {
        "advantage_episode": _mean_magnitude(episode(batch, context), batch),
        "advantage_step": _mean_magnitude(step(batch, context), batch),
        "states_shared": int(visits[visits > 1].sum()) / visited if visited else 0.0,
        **({"states_named": float(named)} if states == "states:state_key" else {}),
    }


def _mean_magnitude(advantages: Tensor, batch: Batch) -> float:
    return float(functional.masked_mean(advantages.abs(), batch.action_mask))
