"""COPO: groups that agree are compared with other groups, the others within."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.answers import Answer
from agentrl.algorithms.hooks import Advantage, Context, MiniBatch, requires
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Weight
from agentrl.data.batch import Batch


@recipe("copo")
@dataclass(frozen=True)
class COPO(Recipe):
    """Consistency-aware policy optimisation: a group with one answer still has an advantage.

        A = w A_local + (1 - w) A_global,   w = sigmoid(steepness (S - centre * log n))
        A_global = (mean R of the group - its mean over groups) / (its std over groups + 1e-6)

    A_local is the advantage of the base, S the entropy of the answers of the group and n its size. A_global
    is the same for all episodes of a group, also for one in which all fail or succeed.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | paper    | ours
        base.kl_coefficient | 0.0   | 0.0      | 0.0
        steepness           | 20.0  | 20.0     | 20.0
        centre              | 0.72  | 0.72     | 0.72

    This is a reconstruction from the abstract and a summary: the paper's global reward could not be
    established, and the mean return stands in for it. It blends losses; we blend advantages, which is the
    same where nothing is clipped. Its centre is 1.5 nats, 0.72 of the largest entropy of a group of 8;
    smaller groups would never reach it. The released code was not read; `released` has the same values.

    Args:
        base: The recipe that provides the local advantage. Its selection of groups is left out.
        steepness: How sharply w changes, per nat.
        centre: The entropy at which both count alike, as a part of log n.
        answers: What is compared: see `answer_clusters`.

    Source: Han et al. 2025, arXiv:2508.04138.
    """

    KIND = "credit"
    CONFIDENCE = "reconstruction"

    PRESETS: ClassVar[Presets] = {
        preset: {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    steepness: Weight = 20.0
    centre: Weight = 0.72
    answers: Answer = "normalised"

    def build(self) -> Algorithm:
        """Build the base with the blended advantage."""
        base, name = self.base.build(), f"answer_entropy:{self.answers}"
        blended = partial(self.blend, local=base.advantage, name=name)
        # The requirements of the base's advantage stay those of the blend.
        advantage = requires(name, *base.requires_of("advantage"))(blended)
        metrics = requires(name)(partial(self.metrics, name=name))
        return replace(base, select=keep_all, advantage=advantage, diagnostics=(*base.diagnostics, metrics))

    def local_share(self, batch: Batch, name: str) -> Tensor:
        """Return w of each episode; [E] float64."""
        sizes = (batch.groups[:, None] == batch.groups).sum(dim=1).double()
        entropies = feature_of(batch, name).double()
        return (self.steepness * (entropies - self.centre * sizes.log())).sigmoid()

    def blend(self, batch: Batch, context: Context, *, local: Advantage, name: str) -> Tensor:
        """Return the blended advantage; [B, T] float64."""
        spread = partial(
            functional.broadcast_to_tokens, trajectory=batch.trajectory, action_mask=batch.action_mask
        )
        share = self.local_share(batch, name)
        between = spread((1 - share) * compare_groups(batch))
        return spread(share) * local(batch, context) + between

    def metrics(self, rollout: MiniBatch, context: Context, *, name: str) -> Mapping[str, float]:
        """Return the mean share of the local advantage over episodes."""
        share = self.local_share(rollout.batch, name)
        return {"copo/local_share": float(share.mean())} if len(share) else {}


def compare_groups(batch: Batch) -> Tensor:
    """Return the mean return of each episode's group, centred and scaled over groups; [E] float64."""
    found, member = batch.groups.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    sums = batch.returns.new_zeros(len(found)).index_add(0, member, batch.returns)
    means = sums / torch.bincount(member, minlength=len(found)).clamp(min=1)
    return functional.group_relative_advantage(means, torch.zeros_like(found))[member]
