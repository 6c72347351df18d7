"""HICRA: more credit and less blame for the tokens of planning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import thought_tokens, turn_table, turns_to_tokens
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share
from agentrl.data.batch import Batch

GRAMS = (
    "let me",
    "let's",
    "first",
    "wait",
    "instead",
    "alternatively",
    "on second thought",
    "to check",
    "double-check",
    "verify",
    "the plan",
    "i need to",
    "i should",
    "step by step",
    "but what if",
    "go back",
)


@recipe("hicra")
@dataclass(frozen=True)
class HICRA(Recipe):
    """Hierarchy-aware credit assignment: the advantage of planning tokens is raised.

        A' = A + alpha |A|   at planning tokens,   A   elsewhere

    Planning tokens are those of the reasoning before a choice among actions (`policy.reply=think_action`);
    of other replies, all tokens of one whose text holds a strategic gram. With alpha 0 it is its base.

        field               | paper   | released | ours
        base.name           | dr_grpo | dr_grpo  | dr_grpo
        base.preset         | paper   | paper    | ours
        alpha               | 0.2     | 0.2      | 0.2

    This is a reconstruction: equation and alpha are the paper's, as a summary has them. The paper mines its
    grams, n-grams that are frequent across solutions and rare within one, and marks their tokens; our list is
    short, and marks whole replies, since methods see the text of a reply and not that of its tokens. There is
    no released code; `released` has the paper's values.

    Args:
        base: The recipe whose advantages are changed.
        alpha: By which part of its size an advantage is raised.
        grams: The strategic grams, compared without case.

    Source: Wang et al. 2025, arXiv:2509.03646.
    """

    KIND = "credit"
    CONFIDENCE = "reconstruction"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "dr_grpo", "preset": "paper"}},
        "released": {"base": {"name": "dr_grpo", "preset": "paper"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("dr_grpo"))
    alpha: Share = 0.2
    grams: tuple[str, ...] = GRAMS

    def build(self) -> Algorithm:
        """Build the base with raised advantages."""
        base = self.base.build()
        return replace(
            base,
            transforms=(*base.transforms, self.raise_planning),
            diagnostics=(*base.diagnostics, self.metrics),
        )

    def raise_planning(self, advantages: Tensor, batch: Batch, context: Context) -> Tensor:
        """Raise the advantage of the planning tokens; [B, T]."""
        raised = advantages + self.alpha * advantages.abs()
        return torch.where(self.planning_tokens(batch), raised, advantages)

    def planning_tokens(self, batch: Batch) -> Tensor:
        """Mark the planning tokens; [B, T] bool."""
        spoken = turn_table(
            batch,
            [
                [
                    float(any(gram.casefold() in turn.action.casefold() for gram in self.grams))
                    for turn in episode.turns
                ]
                for episode in batch.episodes
            ],
        )
        return thought_tokens(batch) | (turns_to_tokens(spoken, batch) > 0)

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the share of the planning tokens, and the entropy of the grams over the replies, in nats."""
        mask = rollout.batch.action_mask
        planned = int((self.planning_tokens(rollout.batch) & mask).sum())
        texts = [turn.action.casefold() for episode in rollout.batch.episodes for turn in episode.turns]
        counts = [sum(gram.casefold() in text for text in texts) for gram in self.grams]
        return {
            "hicra/planning_share": planned / max(1, int(mask.sum())),
            "hicra/gram_entropy": gram_entropy(counts),
        }


def gram_entropy(counts: list[int]) -> float:
    """Return the entropy of the distribution with these counts, in nats; 0 without any."""
    shares = torch.tensor(counts, dtype=torch.float64)
    shares = shares[shares > 0] / max(1, sum(counts))
    return float(-(shares * shares.log()).sum())
