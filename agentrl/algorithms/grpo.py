"""GRPO, and the corrected form that leaves out its two biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import (
    Aggregation,
    Algorithm,
    Bounds,
    Context,
    MiniBatch,
    Outputs,
    Term,
    drop_equal_returns,
    given,
    group_advantage,
    keep_all,
    requires,
)
from agentrl.algorithms.recipe import Recipe, recipe
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError

_KL = {"k1": functional.kl_k1, "k2": functional.kl_k2, "k3": functional.kl_k3}


@recipe("grpo")
@dataclass(frozen=True)
class GRPO(Recipe):
    """Group-relative policy optimisation: returns centred within the group, a clipped ratio, no critic.

    Args:
        clip_low: the ratio is held above 1 - clip_low.
        clip_high: and below 1 + clip_high.
        dual_clip: where the advantage is negative, the loss is at most -advantage times this; None for no
            limit.
        divide_by_std: divide centred returns by their standard deviation within the group.
        weighting: `row` counts a trajectory once per turn in the group's mean and deviation, as verl-agent
            does.
        aggregation: how token losses become one number; `sequence` is the mean over the tokens of a sequence,
            then over sequences, `trajectory` goes by tokens, turns and trajectories, `constant` divides by a
            length.
        sequence: what a sequence is, for `sequence` and `constant`.
        sequence_length: divisor of `constant`, in tokens that were decisions.
        kl_coefficient: of the divergence from the policy that training started from.
        kl_estimator: k2 has the gradient of the true divergence, k3 the lowest variance of its value.
        entropy_coefficient: of the entropy bonus, in reward-free loss units per nat.
        invalid_penalty: taken off a turn's reward when its action was not understood.
        drop_equal_groups: leave out groups whose episodes all have the same return.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    divide_by_std: bool = True
    weighting: Literal["trajectory", "row"] = "trajectory"
    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "sequence"
    sequence: Literal["turn", "trajectory"] = "trajectory"
    sequence_length: int | None = None
    kl_coefficient: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coefficient: float = 0.0
    invalid_penalty: float = 0.0
    drop_equal_groups: bool = True

    def __post_init__(self) -> None:
        mistakes = [text for wrong, text in self._contradictions() if wrong]
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def build(self) -> Algorithm:
        return Algorithm(
            select=drop_equal_returns if self.drop_equal_groups else keep_all,
            shape_reward=(partial(penalise_invalid, penalty=self.invalid_penalty),)
            if self.invalid_penalty
            else (),
            advantage=partial(group_advantage, divide_by_std=self.divide_by_std, weighting=self.weighting),
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=self.dual_clip),
            aggregation=aggregation(self.aggregation, self.sequence, self.sequence_length),
            terms=tuple(self._terms()),
        )

    def _terms(self) -> Sequence[Term]:
        terms = []
        if self.kl_coefficient:
            terms.append(
                Term("kl", partial(kl_to_reference, estimator=self.kl_estimator), self.kl_coefficient)
            )
        if self.entropy_coefficient:
            terms.append(Term("entropy", entropy_bonus, -self.entropy_coefficient))
        return terms

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            (not 0 <= self.clip_low <= 1, f"clip_low is {self.clip_low}, wanted within [0, 1]"),
            (self.clip_high < 0, f"clip_high is {self.clip_high}, wanted at least 0"),
            (
                self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high,
                f"dual_clip is {self.dual_clip}, wanted above 1 + clip_high ({1 + self.clip_high}): "
                "below, it would undo the first clip",
            ),
            (
                self.aggregation == "constant" and self.sequence_length is None,
                "aggregation=constant needs sequence_length, the divisor in tokens",
            ),
            (
                self.sequence_length is not None and self.sequence_length < 1,
                f"sequence_length is {self.sequence_length}, wanted at least 1",
            ),
            (self.kl_coefficient < 0, f"kl_coefficient is {self.kl_coefficient}, wanted at least 0"),
            (self.invalid_penalty < 0, f"invalid_penalty is {self.invalid_penalty}, wanted at least 0"),
        ]


@recipe("dr_grpo")
@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO done right: no division by the deviation, and no discount for long trajectories.

    The fields are those of `grpo`; two defaults differ.
    """

    divide_by_std: bool = False
    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "constant"
    sequence_length: int | None = 32


def aggregation(kind: str, sequence: functional.Unit, length: int | None) -> Aggregation:
    """Choose an aggregation of `functional` by name."""
    if kind == "sequence":
        return partial(functional.sequence_weights, sequence=sequence)
    if kind == "constant" and length is not None:
        return partial(functional.constant_weights, length=length, sequence=sequence)
    return functional.token_weights if kind == "token" else functional.trajectory_weights


def fixed_clip(mini: MiniBatch, context: Context, *, low: float, high: float, dual: float | None) -> Bounds:
    """Bounds [1 - low, 1 + high] for every token."""
    return Bounds(1 - low, 1 + high, dual)


def penalise_invalid(episode: Episode, context: Context, *, penalty: float) -> Sequence[float]:
    """The environment's rewards, less `penalty` at every turn whose action was not understood."""
    return [turn.reward - (0.0 if turn.valid else penalty) for turn in episode.turns]


@requires("reference")
def kl_to_reference(outputs: Outputs, mini: MiniBatch, context: Context, *, estimator: str = "k3") -> Tensor:
    """Divergence from the reference policy at the sampled tokens; [B, T] nats."""
    return _KL[estimator](outputs.logprobs, given(mini.batch.reference_logprobs, "reference_logprobs"))


@requires("entropy:grad")
def entropy_bonus(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    """Entropy of the policy at every decision; [B, T] nats. Its coefficient is negative: a loss goes down."""
    return outputs.entropies
