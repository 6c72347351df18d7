"""The base class of recipes with a clipped ratio, and the hooks that its fields choose."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, clipped_policy_loss, drop_equal_returns, keep_all
from agentrl.algorithms.hooks import (
    ADAPTIVE_BOUNDS,
    Aggregation,
    Bounds,
    Clip,
    Context,
    MiniBatch,
    Outputs,
    Term,
    require_tensor,
    requires,
    traits,
)
from agentrl.algorithms.recipe import Presets, Recipe
from agentrl.config import Share, SignedWeight, Tokens, Weight
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError

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


def build_clipped(base: Recipe, method: str) -> tuple[Algorithm, Clip]:
    """Build the base of a method that replaces the bounds of the ratio; return it and its clip.

    Raises:
        ConfigError: If the base clips no ratio, or finds its bounds in each mini-batch: they would be lost.
    """
    built = base.build()
    if built.clip is None:
        raise ConfigError(f"{method}: base {base.name!r} has no clipped ratio, wanted one that has")
    if _adapts(built.clip):
        raise ConfigError(
            f"{method}: it would replace the bounds that base {base.name!r} finds in each mini-batch, wanted "
            "a base with fixed bounds"
        )
    return built, built.clip


def build_plain(base: Recipe, method: str) -> Algorithm:
    """Build the base of a method that replaces the clipped loss.

    Raises:
        ConfigError: If the base has another loss, which would be lost.
    """
    built, _ = build_clipped(base, method)
    if built.surrogate is not clipped_policy_loss:
        raise ConfigError(f"{method}: base {base.name!r} has no clipped ratio, wanted one that has")
    return built


def _adapts(clip: object) -> bool:
    """Return whether bounds are found in each mini-batch, by a clip or by one that it wraps."""
    wrapped = clip.keywords.values() if isinstance(clip, partial) else ()
    return ADAPTIVE_BOUNDS in traits(clip) or any(map(_adapts, wrapped))


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
