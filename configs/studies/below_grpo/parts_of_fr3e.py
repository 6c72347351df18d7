"""FR3E with single parts replaced by those of GRPO, to find out which of them costs success."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, drop_equal_returns
from agentrl.algorithms.features import tokens_after_branching
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.methods.fr3e import FR3E, exploration_advantage
from agentrl.algorithms.recipe import recipe
from agentrl.data.batch import Batch


@recipe("fr3e_parts")
@dataclass(frozen=True)
class FR3EParts(FR3E):
    """FR3E with single parts replaced by those of GRPO.

    Args:
        credit: `state` compares a continuation with those from its state, `group` with all of the task.
        taught: `own` learns from the continuations' own tokens, `all` from every action token (only `group`).
        modulated: Whether the advantage is multiplied by the factor of its state.
        average: `token` weights every token of the batch equally, `sequence` every trajectory.
    """

    credit: Literal["state", "group"] = "state"
    taught: Literal["own", "all"] = "own"
    modulated: bool = True
    average: Literal["token", "sequence"] = "token"

    def build(self) -> Algorithm:
        """Build FR3E with the parts of GRPO."""
        built = super().build()
        if self.average == "sequence":
            built = replace(built, aggregation=functional.sequence_weights)
        if self.credit == "group":
            whole = self.taught == "all"
            return replace(
                built,
                select=drop_equal_returns,
                advantage=partial(group_advantage, divide_by_std=self.divide_by_std, whole=whole),
                masks=() if whole else (own_tokens,),
            )
        if not self.modulated:
            plain = partial(exploration_advantage, modulate=unmodulated, divide_by_std=self.divide_by_std)
            built = replace(built, advantage=plain)
        return built


def unmodulated(values: Tensor, bases: Tensor, differ: Tensor) -> Tensor:
    """Return a factor of 1 for every state; [S]."""
    return values.new_ones(values.shape)


def own_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the action tokens that a continuation does not share with its base; [B, T] bool."""
    return tokens_after_branching(mini.batch)


def group_advantage(batch: Batch, context: Context, *, divide_by_std: bool, whole: bool) -> Tensor:
    """Return the returns compared within the group, at all action tokens or a continuation's own; [B, T]."""
    centred = functional.group_relative_advantage(batch.returns, batch.groups, divide_by_std=divide_by_std)
    taught = batch.action_mask if whole else tokens_after_branching(batch)
    return functional.broadcast_to_tokens(centred, batch.trajectory, taught)
