"""The frozen teacher of a learner: it reads the policy's tokens, and is never trained or saved."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agentrl.algorithms.hooks import Outputs
from agentrl.data.batch import Batch
from agentrl.learn.forward import Forward, Shown
from agentrl.learn.sharding import ScoringModule, reshard


@dataclass(frozen=True)
class Teacher:
    """Teacher of a learner.

    Args:
        module: Its weights, which have no gradient.
        forward: How to read it.
    """

    module: ScoringModule
    forward: Forward

    def show(self, rows: Batch) -> Shown:
        """Return its states at the action tokens and its output embedding, until `release` is called."""

        def read(policy: nn.Module, head: nn.Module | None) -> tuple[Tensor, Tensor]:
            return self.forward.show(policy, rows)

        with torch.no_grad():
            shown: Shown = self.module(read)
        return shown

    def score(self, rows: Batch) -> Outputs:
        """Score the tokens of some rows."""
        with torch.no_grad():
            outputs: Outputs = self.module(lambda policy, head: self.forward.score(policy, rows))
        return outputs

    def release(self) -> None:
        """Free the weights that reading it has gathered."""
        reshard(self.module)
