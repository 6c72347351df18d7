"""DRPO: good episodes are told apart from bad ones, and short good ones count more."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, drop_equal_returns, keep_all
from agentrl.algorithms.hooks import (
    Bounds,
    Context,
    GroupTerm,
    GroupValues,
    MiniBatch,
    Outputs,
    Term,
    require_tensor,
    requires,
    trait,
)
from agentrl.algorithms.recipe import Presets, Recipe, recipe
from agentrl.config import PositiveWeight, Tokens, Weight
from agentrl.data.batch import Batch


@recipe("drpo")
@dataclass(frozen=True)
class DRPO(Recipe):
    """Decoupled reward policy optimisation: no ratio and no advantage, but a margin of good over bad.

        s    = mean log-probability of the action tokens of an episode
        J    = sum over the good of w s - temperature * log(mean over the bad of exp(s / temperature))
        w    = softmax over the good of -length / (longest * sharpness)
        loss = -mean over groups of J + sg(trust * max(KL - radius, 0)) * KL

    Good episodes have a return above the mean of their group, which for returns of 0 and 1 are those of 1; a
    group of one kind adds 0. KL is the mean over tokens of log pi_old - log pi. The lengths of good episodes
    are compared with each other alone, so that no good one is punished for its length.

        field             | paper  | released | ours
        length            | tokens | tokens   | turns
        longest           | 8192   | 8192     | 30
        drop_equal_groups | false  | false    | true

    The values are those of the released code, whose groups are of 8, sampled at a temperature of 0.6, with a
    learning rate of 2e-6. The gradient is the same; its logged loss has no meaning.

    Args:
        length: What the length of an episode is.
        longest: The length to compare with.
        sharpness: How little short episodes are preferred; the weights are equal for large values.
        temperature: The temperature of the mean over the bad, in nats.
        trust: The slope of the coefficient of KL.
        radius: The divergence up to which nothing is paid, in nats.
        drop_equal_groups: As in `grpo`.

    Source: Li et al. 2025, arXiv:2510.04474.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        preset: {"length": "tokens", "longest": 8192, "drop_equal_groups": False}
        for preset in ("paper", "released")
    }

    length: Literal["turns", "tokens"] = "turns"
    longest: Tokens = 30
    sharpness: PositiveWeight = 0.1
    temperature: PositiveWeight = 10.0
    trust: Weight = 1000.0
    radius: Weight = 1e-4
    drop_equal_groups: bool = True

    def build(self) -> Algorithm:
        """Build the algorithm."""
        where = partial(excess_divergence, radius=self.radius)
        return Algorithm(
            select=drop_equal_returns if self.drop_equal_groups else keep_all,
            advantage=no_advantage,
            clip=None,
            surrogate=no_policy_loss,
            terms=(Term("drpo_kl", divergence, self.trust, functional.token_weights, where),),
            group_terms=(GroupTerm("drpo", self.negative_margin),),
        )

    def negative_margin(self, values: GroupValues, context: Context) -> Tensor:
        """Return -J of a group."""
        scores, returns = values.logprobs / values.tokens, values.returns
        good = returns - returns.mean() > functional.EQUAL_RETURNS
        if not bool(good.any()) or bool(good.all()):
            return 0 * scores.sum()
        lengths = values.tokens
        if self.length == "turns":
            lengths = torch.tensor([len(episode.turns) for episode in values.episodes], device=scores.device)
        weights = (-lengths[good].double() / (self.longest * self.sharpness)).softmax(dim=0)
        bad = scores[~good] / self.temperature
        mean = bad.logsumexp(dim=0) - torch.tensor(float(len(bad)), device=bad.device).log()
        return self.temperature * mean - (weights * scores[good]).sum()


def no_advantage(batch: Batch, context: Context) -> Tensor:
    """Return 0 everywhere; [B, T]."""
    return torch.zeros_like(batch.logprobs)


@trait("no advantage")
def no_policy_loss(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Return 0 everywhere; [B, T]."""
    return torch.zeros_like(outputs.logprobs)


@requires("old_logprobs")
def divergence(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    """Return log pi_old - log pi of every token; [B, T] nats."""
    return -functional.kl_k1(outputs.logprobs, require_tensor(mini.batch.old_logprobs, "old_logprobs"))


@requires("current", "old_logprobs")
def excess_divergence(mini: MiniBatch, context: Context, *, radius: float) -> Tensor:
    """Return by how much the divergence of the mini-batch is above the radius, at every token; [B, T]."""
    mean = functional.masked_mean(divergence(mini.now, mini, context).double(), mini.batch.action_mask)
    return (mean - radius).clamp(min=0).expand(mini.batch.tokens.shape)
