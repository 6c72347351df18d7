"""Two small components that remember: counts of the states seen, and a model of returns that is trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires
from agentrl.algorithms.states import VisitCounts
from agentrl.data import Episode
from agentrl.data.batch import Batch


class VisitBonus(VisitCounts):
    """Adds 1 / sqrt(1 + n) to the reward of a turn whose state was seen in n turns of earlier steps."""

    def bonus(self, episode: Episode, context: Context) -> Sequence[float]:
        visits = self.visits(episode)
        return [turn.reward + (1 + n) ** -0.5 for turn, n in zip(episode.turns, visits, strict=True)]

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        return {"visits/states": float(len(self))}


@requires("old_logprobs", "entropy")
class ReturnModel:
    """Adds to the advantage of a token the return that a linear model expects after it, trained by Adam."""

    name = "return_model"

    def __init__(self, seed: int = 0) -> None:
        self.model = nn.Linear(2, 1, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.copy_(
                torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            )
            self.model.bias.zero_()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def expected(self, batch: Batch) -> Tensor:
        scores = (
            require_tensor(batch.old_logprobs, "old_logprobs"),
            require_tensor(batch.old_entropies, "entropy"),
        )
        return self.model(torch.stack(scores, dim=-1).double().cpu()).squeeze(-1)

    def __call__(self, advantages: Tensor, batch: Batch, context: Context) -> Tensor:
        return advantages + 0.1 * self.expected(batch).to(advantages)

    def update(self, rollout: MiniBatch, context: Context) -> None:
        batch = rollout.batch.to("cpu")
        error = self.expected(batch) - batch.returns[batch.trajectory][:, None]
        self.optimizer.zero_grad()
        error[batch.action_mask].square().mean().backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def flat(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.model.parameters()])
