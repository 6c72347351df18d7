"""Behaviour cloning: maximise the likelihood of the demonstrations' action tokens."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.clipped_recipe import aggregation
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs
from agentrl.algorithms.recipe import Recipe, build_recipe, recipe
from agentrl.data.batch import Batch


@recipe("behaviour_cloning")
@dataclass(frozen=True)
class BehaviourCloning(Recipe):
    """Imitation of demonstrations: cross-entropy of their action tokens, whatever their return.

        loss = -mean log pi(token),   over the action tokens

        field       | paper      | released   | ours
        aggregation | token      | token      | token
        sequence    | trajectory | trajectory | trajectory

    There is neither a paper nor released code; the values of all presets are ours.

    Args:
        aggregation: How token losses are averaged, as in `grpo`; `token` weights every action token equally.
        sequence: The unit that `aggregation: sequence` averages over first.
    """

    KIND = "imitation"

    aggregation: Literal["token", "sequence", "trajectory"] = "token"
    sequence: Literal["turn", "trajectory"] = "trajectory"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        return Algorithm(
            select=keep_all,
            advantage=equal_advantage,
            clip=None,
            surrogate=negative_logprob,
            aggregation=aggregation(self.aggregation, self.sequence, None),
            diagnostics=(),
        )


def equal_advantage(batch: Batch, context: Context) -> Tensor:
    """Return 1 at every action token; [B, T]."""
    return batch.action_mask.float()


def negative_logprob(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Return the cross-entropy, weighted by the advantage; [B, T] nats."""
    return -mini.advantages * outputs.logprobs


def cloning() -> Algorithm:
    """Build the algorithm of behaviour cloning."""
    return build_recipe("behaviour_cloning").build()
