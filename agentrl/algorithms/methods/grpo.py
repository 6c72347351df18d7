"""GRPO and Dr. GRPO, and the base class of recipes with a clipped ratio."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, drop_equal_returns, keep_all
from agentrl.algorithms.features import row_scores, turn_exists, turns_to_tokens
from agentrl.algorithms.hooks import (
    COMPARES,
    Advantage,
    Aggregation,
    Bounds,
    Context,
    MiniBatch,
    Outputs,
    Term,
    require_tensor,
    requires,
    trait,
    traits,
)
from agentrl.algorithms.recipe import Presets, Recipe, recipe
from agentrl.config import Share, SignedWeight, Tokens, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode

Weighting = Literal["trajectory", "row"]
Estimate = Callable[[Tensor, Tensor], Tensor]

K3_LIMIT = 10.0  # nats, as in the released code
_KL = {"k1": functional.kl_k1, "k2": functional.kl_k2, "k3": functional.kl_k3}


@dataclass(frozen=True)
class ClippedRecipe(Recipe):
    """Base class of GRPO, PPO, RLOO, REINFORCE++ and GiGPO: everything but the advantage.

        loss = mean of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    Args:
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        dual_clip: Where the advantage is negative, the loss is at most -advantage times this; null for no
            limit.
        aggregation: How token losses are averaged: `token` over all tokens; `sequence` over the tokens of a
            sequence, then over sequences; `trajectory` over the tokens of a turn, then turns, then
            trajectories; `constant` sums over a sequence and divides by `sequence_length`.
        sequence: What a sequence is, for `sequence` and `constant`: a `turn` or a `trajectory`.
        sequence_length: The divisor of `constant`, in action tokens.
        kl_coefficient: The coefficient of the KL divergence from the initial policy.
        kl_estimator: The estimator of the divergence: k2 has the gradient of the true divergence, k3 the
            lowest variance of its value.
        entropy_coefficient: The coefficient of the entropy bonus, in loss units per nat.
        invalid_penalty: The penalty subtracted from a turn's reward if its action was invalid.
        drop_equal_groups: Whether to leave out groups whose episodes all have the same return.
        parity: `official` follows the preset `released` in the fields of the recipe's table and in behaviour
            that no field describes (k3 clamped to +-10), and refuses other values; `paper` has no effect.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {"drop_equal_groups": False},
        "released": {"dual_clip": 3.0, "aggregation": "token", "drop_equal_groups": False},
    }
    OFFICIAL: ClassVar[Collection[str]] = ("dual_clip", "aggregation", "drop_equal_groups")

    clip_low: Share = 0.2
    clip_high: Weight = 0.2
    dual_clip: Annotated[float, Interval(gt=1, le=1e7)] | None = None
    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "sequence"
    sequence: Literal["turn", "trajectory"] = "trajectory"
    sequence_length: Tokens | None = None
    kl_coefficient: Weight = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coefficient: SignedWeight = 0.0
    invalid_penalty: Weight = 0.0
    drop_equal_groups: bool = True
    parity: Literal["paper", "official"] = "paper"

    def build(self) -> Algorithm:
        """Build the algorithm, without the advantage of the method."""
        return Algorithm(
            select=drop_equal_returns if self.drop_equal_groups else keep_all,
            shape_reward=(partial(penalise_invalid, penalty=self.invalid_penalty),)
            if self.invalid_penalty
            else (),
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=self.dual_clip),
            aggregation=aggregation(self.aggregation, self.sequence, self.sequence_length),
            terms=tuple(self._terms()),
        )

    def _terms(self) -> Sequence[Term]:
        terms = []
        if self.kl_coefficient:
            limit = K3_LIMIT if self.preset == "released" and self.kl_estimator == "k3" else None
            divergence = partial(kl_to_reference, estimator=self.kl_estimator, limit=limit)
            terms.append(Term("kl", divergence, self.kl_coefficient))
        if self.entropy_coefficient:
            terms.append(Term("entropy", entropy_bonus, -self.entropy_coefficient))
        return terms

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            (
                self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high,
                f"dual_clip is {self.dual_clip}, wanted above 1 + clip_high ({1 + self.clip_high}): "
                "otherwise it would undo the first clip",
            ),
            (
                self.aggregation == "constant" and self.sequence_length is None,
                "aggregation=constant needs sequence_length, the divisor in tokens",
            ),
        ]


@recipe("grpo")
@dataclass(frozen=True)
class GRPO(ClippedRecipe):
    """Group-relative policy optimisation: returns normalised within the group, a clipped ratio, no critic.

        A    = (R - mean R) / (std R + 1e-6),   over the episodes of the group
        loss = mean of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    The preset `released` weights by rows, so that a long trajectory moves the mean more, and clamps the k3
    divergence to +-10.

        field             | paper      | released | ours
        dual_clip         | null       | 3.0      | null
        aggregation       | sequence   | token    | sequence
        kl_coefficient    | 0.04       | 0.0      | 0.0
        drop_equal_groups | false      | false    | true
        weighting         | trajectory | row      | trajectory
        singleton         | zero       | raw      | zero

    The published runs used groups of 64, a learning rate of 1e-6 and one update per batch. The released code
    is verl-agent, whose scripts for text games add kl_coefficient 0.01 and invalid_penalty 0.1.

    Args:
        divide_by_std: Whether to divide centred returns by their standard deviation within the group.
        weighting: What is compared within a group: `trajectory` compares the returns of trajectories; `row`
            compares turns, each with the return of its episode less only its own invalid penalty.
        singleton: The advantage of the only member of a group: `zero`, or its `raw` return.

    The remaining fields are those of `ClippedRecipe`.

    Source: Shao et al. 2024, arXiv:2402.03300.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {"kl_coefficient": 0.04},
        "released": {"weighting": "row", "singleton": "raw"},
    }
    OFFICIAL: ClassVar[Collection[str]] = (*ClippedRecipe.OFFICIAL, "weighting", "singleton")

    divide_by_std: bool = True
    weighting: Weighting = "trajectory"
    singleton: functional.Singleton = "zero"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        estimate = partial(
            functional.group_relative_advantage,
            divide_by_std=self.divide_by_std,
            singleton=self.singleton,
        )
        advantage = partial(
            compare_in_groups,
            estimate=estimate,
            weighting=self.weighting,
            invalid_penalty=self.invalid_penalty,
        )
        return replace(super().build(), advantage=mark_comparing(advantage, self.singleton))


@recipe("dr_grpo")
@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO done right: no division by the standard deviation, and no discount for long trajectories.

        A    = R - mean R,   over the episodes of the group
        loss = mean over episodes of (sum of token losses / sequence_length)

    The fields are those of `grpo`; three defaults differ.

        field             | paper      | released | ours
        dual_clip         | null       | 3.0      | null
        aggregation       | constant   | constant | constant
        sequence_length   | 3000       | 32       | 32
        kl_coefficient    | 0.0        | 0.0      | 0.0
        drop_equal_groups | false      | false    | true
        weighting         | trajectory | row      | trajectory
        singleton         | zero       | raw      | zero

    The paper divides by the maximum number of reply tokens, 3000 in its runs (groups of 8, learning rate
    1e-6); `sequence_length` 32 suits short commands. The released code is verl-agent, which divides by the
    width of the padding. That is not reproduced, so `released` has our value.

    Source: Liu et al. 2025, arXiv:2503.20783.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {"kl_coefficient": 0.0, "sequence_length": 3000},
        "released": {"aggregation": "constant"},
    }
    OFFICIAL: ClassVar[Collection[str]] = tuple(name for name in GRPO.OFFICIAL if name != "aggregation")

    divide_by_std: bool = False
    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "constant"
    sequence_length: Tokens | None = 32


def compare_in_groups(
    batch: Batch, context: Context, *, estimate: Estimate, weighting: Weighting, invalid_penalty: float
) -> Tensor:
    """Compare returns within their groups, and give every action token the result; [B, T] float64.

    Args:
        batch: The batch of the returns.
        context: Not read.
        estimate: (returns, groups) -> advantages, one per return.
        weighting: `trajectory` compares trajectories by their returns, `row` compares turns by `row_scores`.
        invalid_penalty: The penalty contained in the rewards of invalid turns, for `row`.
    """
    if weighting == "trajectory":
        return functional.broadcast_to_tokens(
            estimate(batch.returns, batch.groups), batch.trajectory, batch.action_mask
        )
    scores, exists = row_scores(batch, invalid_penalty), turn_exists(batch)
    compared = torch.zeros_like(scores)
    compared[exists] = estimate(scores[exists], batch.groups[:, None].expand_as(scores)[exists])
    return turns_to_tokens(compared, batch)


def mark_comparing(advantage: Advantage, singleton: functional.Singleton) -> Advantage:
    """Mark an advantage as comparing within a group, unless a `singleton` has an advantage of its own."""
    return trait(COMPARES, *traits(advantage))(advantage) if singleton == "zero" else advantage


def aggregation(kind: str, sequence: functional.Unit, length: int | None) -> Aggregation:
    """Return the aggregation of `functional` with this name."""
    if kind == "sequence":
        return partial(functional.sequence_weights, sequence=sequence)
    if kind == "constant" and length is not None:
        return partial(functional.constant_weights, length=length, sequence=sequence)
    return functional.token_weights if kind == "token" else functional.trajectory_weights


def fixed_clip(mini: MiniBatch, context: Context, *, low: float, high: float, dual: float | None) -> Bounds:
    """Bound the ratio of every token to [1 - low, 1 + high]."""
    return Bounds(1 - low, 1 + high, dual)


def penalise_invalid(episode: Episode, context: Context, *, penalty: float) -> Sequence[float]:
    """Return the rewards, less `penalty` at every turn with an invalid action."""
    return [turn.reward - (0.0 if turn.valid else penalty) for turn in episode.turns]


@requires("reference")
def kl_to_reference(
    outputs: Outputs, mini: MiniBatch, context: Context, *, estimator: str = "k3", limit: float | None = None
) -> Tensor:
    """Estimate the KL divergence from the reference policy per sampled token, in +-limit; [B, T] nats."""
    divergence = _KL[estimator](
        outputs.logprobs, require_tensor(mini.batch.reference_logprobs, "reference_logprobs")
    )
    return divergence if limit is None else divergence.clamp(-limit, limit)


@requires("entropy:grad")
def entropy_bonus(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    """Return the entropy at every action token; [B, T] nats. A bonus has a negative coefficient."""
    return outputs.entropies
