"""On-policy distillation: the policy acts, and a teacher judges every token that it wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.features import decisions
from agentrl.algorithms.hooks import (
    COMPARES,
    TOKEN_TRANSFORM,
    Context,
    MiniBatch,
    Outputs,
    Term,
    excludes,
    require_tensor,
    requires,
    token_statistic,
    trait,
    traits,
)
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch


@recipe("distill")
@dataclass(frozen=True)
class Distill(Recipe):
    """On-policy distillation: every token that the policy wrote is judged by the teacher, `learner.teacher`.

        advantage:  A_t  = reward_coefficient * A_t of the base - beta * (log pi_old - log pi_teacher)_t
        loss:       loss = that of the base + beta * mean over the action tokens of D(pi, pi_teacher)

    The teacher's part is added after the base has normalised its advantages. Its log-ratio is an unbiased
    estimate of the reverse KL over the tokens that the policy samples; D is over the whole vocabulary, see
    `interpolated_divergence`. Both are at the sampling temperature and over the admissible choices. A method
    stacked on this one also changes the teacher's part. With beta 0 it is its base.

        field                  | paper | released  | ours
        base.name              | grpo  | grpo      | grpo
        base.drop_equal_groups | true  | false     | true
        mode                   | loss  | advantage | advantage
        reward_coefficient     | 0.0   | 1.0       | 1.0

    `paper` is GKD on the policy's own samples. `released` is the code of tinker-cookbook, which adds centred
    returns, not divided by their deviation, and whose surrogate is not clipped; its log-ratio is that of the
    sampler, ours that of the learner.

    Args:
        base: The recipe that learns from the rewards. Its selection of groups by their returns is left out,
            since the teacher judges every token.
        mode: Where the teacher's part enters.
        beta: The factor of the teacher's part, per nat.
        reward_coefficient: The factor of the base's advantage; 0 distils without a reward.
        discount: The discount per action token of the later log-ratios of the trajectory that a token
            answers for, in mode `advantage`; 0 leaves a token its own.
        interpolation: D in mode `loss`: 1 is the reverse KL(policy || teacher), 0 the forward one, and what
            is between Jensen and Shannon's.

    Source: Agarwal et al. 2023, arXiv:2306.13649; Thinking Machines Lab 2025, On-Policy Distillation.
    """

    KIND = "imitation"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"mode": "loss", "reward_coefficient": 0.0},
        "released": {"base": {"name": "grpo", "drop_equal_groups": False}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    mode: Literal["advantage", "loss"] = "advantage"
    beta: Weight = 1.0
    reward_coefficient: Weight = 1.0
    discount: Share = 0.0
    interpolation: Share = 1.0

    def build(self) -> Algorithm:
        """Build the base with the teacher's part."""
        base = self.base.build()
        transforms = base.transforms
        if self.reward_coefficient not in (0, 1):
            transforms = (*transforms, partial(scale_advantage, factor=self.reward_coefficient))
        found = replace(base, transforms=transforms)
        if not self.reward_coefficient:
            found = replace(base, select=keep_all, advantage=no_advantage, transforms=())
        if not self.beta:
            return found
        if COMPARES in traits(found.select):
            found = replace(found, select=keep_all)
        if self.mode == "loss":
            statistic = f"teacher_divergence:{self.interpolation}"
            loss = requires(f"{statistic}:grad")(partial(divergence, statistic=statistic))
            term = Term("distill", loss, self.beta, functional.token_weights)
            return replace(found, terms=(*found.terms, term))
        judged = partial(add_teacher, beta=self.beta, discount=self.discount)
        return replace(
            found,
            transforms=(*found.transforms, judged),
            diagnostics=(*found.diagnostics, teacher_metrics),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            (
                not self.beta and not self.reward_coefficient,
                "beta and reward_coefficient are 0: nothing is learned, wanted one of them above 0",
            ),
            (
                self.mode == "loss" and self.discount != 0,
                f"discount is {self.discount} with mode=loss, where the teacher gives no advantage; "
                "wanted 0, or mode=advantage",
            ),
            (
                self.mode == "advantage" and self.interpolation != 1,
                f"interpolation is {self.interpolation} with mode=advantage, which estimates the reverse "
                "divergence; wanted 1, or mode=loss",
            ),
        ]


def no_advantage(batch: Batch, context: Context) -> Tensor:
    """Return 0 everywhere; [B, T]."""
    return torch.zeros_like(batch.logprobs)


def scale_advantage(advantages: Tensor, batch: Batch, context: Context, *, factor: float) -> Tensor:
    """Return the advantages times a factor; [B, T]."""
    return advantages * factor


@excludes(no_advantage="its loss reads no advantage, to which the teacher's part could be added")
@requires("old_logprobs", "teacher")
@trait(TOKEN_TRANSFORM)
def add_teacher(
    advantages: Tensor, batch: Batch, context: Context, *, beta: float, discount: float
) -> Tensor:
    """Subtract beta times the log-ratio of policy and teacher, of a token and later ones; [B, T] float64."""
    gap = log_ratio(batch)
    if discount:
        made = decisions(batch)
        gap = made.write(functional.discounted_returns(made.read(gap), made.valid, gamma=discount))
    return advantages.double() - beta * torch.where(batch.action_mask, gap, 0.0)


@requires("old_logprobs", "teacher")
def teacher_metrics(rollout: MiniBatch, context: Context) -> Mapping[str, float]:
    """Return the mean log-ratio over the action tokens, an estimate of the reverse KL in nats."""
    batch = rollout.batch
    return {"distill/kl": float(functional.masked_mean(log_ratio(batch), batch.action_mask))}


def log_ratio(batch: Batch) -> Tensor:
    """Return log pi_old - log pi_teacher of every token; [B, T] float64 nats."""
    old = require_tensor(batch.old_logprobs, "old_logprobs").double()
    return functional.kl_k1(old, require_tensor(batch.teacher_logprobs, "teacher_logprobs"))


def divergence(outputs: Outputs, mini: MiniBatch, context: Context, *, statistic: str) -> Tensor:
    """Return the divergence from the teacher of every token; [B, T] nats."""
    return token_statistic(outputs, statistic)
