"""Behaviour cloning: the demonstrations' own tokens, made more likely."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs
from agentrl.algorithms.methods.grpo import aggregation
from agentrl.algorithms.recipe import Recipe, build_recipe, recipe
from agentrl.data.batch import Batch


@recipe("behaviour_cloning")
@dataclass(frozen=True)
class BehaviourCloning(Recipe):
    """Imitation of demonstrations: cross-entropy at their decisions, whatever their return.

        field       | paper      | released   | ours
        aggregation | token      | token      | token
        sequence    | trajectory | trajectory | trajectory

    It has neither paper nor released code: the presets are all ours.

    Args:
        aggregation: as in `grpo`; `token` lets every decision count the same.
        sequence: what a sequence is, for `sequence`.
    """

    aggregation: Literal["token", "sequence", "trajectory"] = "token"
    sequence: Literal["turn", "trajectory"] = "trajectory"

    def build(self) -> Algorithm:
        return Algorithm(
            select=keep_all,
            advantage=equal_advantage,
            clip=None,
            surrogate=negative_logprob,
            aggregation=aggregation(self.aggregation, self.sequence, None),
            diagnostics=(),
        )


def equal_advantage(batch: Batch, context: Context) -> Tensor:
    """1 at every decision; [B, T]."""
    return batch.sampled.float()


def negative_logprob(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Cross-entropy, weighted by the advantage; [B, T] nats."""
    return -mini.advantages * outputs.logprobs


def cloning() -> Algorithm:
    """Behaviour cloning is an algorithm like any other."""
    return build_recipe("behaviour_cloning").build()
