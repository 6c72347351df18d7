"""SEED-GRPO: smaller steps on tasks whose answers disagree."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.answers import Answer
from agentrl.algorithms.features import decisions
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Weight
from agentrl.data.batch import Batch


@recipe("seed_grpo")
@dataclass(frozen=True)
class SeedGRPO(Recipe):
    """Semantic-entropy GRPO: the advantages of a group shrink with the entropy of its answers.

        A' = A / (1 + alpha S / log n),   S = -sum_c p_c log p_c over the clusters of equal answers
        p_c = sum of exp(l) over the cluster / sum of exp(l) over the n episodes of the group
        l   = mean log-probability of the action tokens of an episode before the update

    With the published alpha the factor is at least 0.96. With alpha 0 it is its base.

        field               | paper   | released | ours
        base.name           | dr_grpo | dr_grpo  | dr_grpo
        base.preset         | paper   | paper    | ours
        alpha               | 0.0417  | 0.0417   | 0.0417

    This is a reconstruction from the abstract and from what others read in the code, whose values `released`
    and `paper` have. The paper's text has a function f(0.02 S / S max) that it does not fix.

    Args:
        base: The recipe whose advantages are scaled.
        alpha: The strength of the scaling.
        answers: What is compared: see `answer_clusters`.

    Source: Chen et al. 2025, arXiv:2505.12346.
    """

    KIND = "credit"
    CONFIDENCE = "reconstruction"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "dr_grpo", "preset": "paper"}},
        "released": {"base": {"name": "dr_grpo", "preset": "paper"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("dr_grpo"))
    alpha: Weight = 0.0417
    answers: Answer = "normalised"

    def build(self) -> Algorithm:
        """Build the base with scaled advantages."""
        base, name = self.base.build(), f"answer_clusters:{self.answers}"
        reads = requires("old_logprobs", name)
        scale = reads(partial(scale_by_disagreement, alpha=self.alpha, name=name))
        metrics = reads(partial(disagreement_metrics, name=name))
        return replace(base, transforms=(*base.transforms, scale), diagnostics=(*base.diagnostics, metrics))


def semantic_entropy(batch: Batch, name: str) -> Tensor:
    """Return the entropy of the answers of an episode's group, weighted by probability; [E] nats."""
    made = decisions(batch)
    old = require_tensor(batch.old_logprobs, "old_logprobs").double()
    means = made.read(old).sum(dim=1) / made.valid.sum(dim=1).clamp(min=1)
    return functional.cluster_entropy(feature_of(batch, name), batch.groups, means)


def scale_by_disagreement(
    advantages: Tensor, batch: Batch, context: Context, *, alpha: float, name: str
) -> Tensor:
    """Divide advantages by 1 + alpha S / log n of their group; [B, T]."""
    _, member, sizes = batch.groups.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    largest = sizes[member].double().log().clamp(min=math.log(2))
    factors = 1 / (1 + alpha * semantic_entropy(batch, name) / largest)
    return advantages * torch.where(batch.action_mask, factors[batch.trajectory][:, None], 0.0)


def disagreement_metrics(rollout: MiniBatch, context: Context, *, name: str) -> Mapping[str, float]:
    """Return the mean semantic entropy over episodes, in nats."""
    found = semantic_entropy(rollout.batch, name)
    return {"seed_grpo/semantic_entropy": float(found.mean())} if len(found) else {}
