"""What a hook of an algorithm receives and returns, and how it declares what it needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode, Group
from agentrl.errors import RequirementError

F = TypeVar("F", bound=Callable[..., Any])
REQUIRES, TRAITS, EXCLUDES = "requires", "traits", "excludes"
SCORED = frozenset({"old_logprobs", "entropy", "reference", "values"})  # filled in by the scoring pass
COMPARES = "comparison within a group"  # a trait: an episode that is alone in its group teaches nothing


@dataclass(frozen=True)
class Context:
    """State across steps, as hooks see it.

    Args:
        step: of training, from 0.
        total_steps: how many there will be.
        history: past per-step values of every logged scalar, oldest first, by the name in the log (what a
            diagnostic calls `x` is `learner/x`); a step that did not log it has no entry.
        seed: of the run; a draw is `derive_seed(context.seed, ...)` of what it is for.
        vocabulary: size of the policy's, for entropies in units of its logarithm.
        tokenizer: fingerprint of the policy's; token ids mean something under this one only.
    """

    step: int = 0
    total_steps: int = 1
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seed: int = 0
    vocabulary: int = 0
    tokenizer: str = ""


@dataclass(frozen=True)
class Outputs:
    """What a policy says about every token: 0 where not sampled."""

    logprobs: Tensor  # [B, T] float, nats
    entropies: Tensor  # [B, T] float, nats
    values: Tensor | None = None  # [B, T] float, return expected before the token; with a value head
    ratio: Tensor | None = None  # [B, T] float, of new to old probability, by `Algorithm.ratio`

    def select(self, rows: Tensor, width: int) -> "Outputs":
        """Keep the given rows, cut to a width."""
        values, ratio = (None if kept is None else kept[rows, :width] for kept in (self.values, self.ratio))
        return Outputs(self.logprobs[rows, :width], self.entropies[rows, :width], values, ratio)


@dataclass(frozen=True)
class Bounds:
    """How far the ratio of new to old probability may go before `surrogate` stops rewarding it."""

    lower: Tensor | float  # [B, T] or a number
    upper: Tensor | float
    dual: float | None = None

    def select(self, rows: Tensor, width: int) -> "Bounds":
        """Keep the given rows, cut to a width."""
        lower, upper = (
            bound[rows, :width] if isinstance(bound, Tensor) and bound.dim() else bound
            for bound in (self.lower, self.upper)
        )
        return Bounds(lower, upper, self.dual)


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimiser step, or of a part of it.

    The objective fills in `mask`, `current.ratio` and `bounds` in this order, each before the next slot is
    asked. Diagnostics and `Replay.keep` see the mask of the whole rollout batch.

    Args:
        batch: the rows.
        advantages: [B, T], final: transformed, without gradient, 0 where not sampled.
        current: what the policy says now, without gradient; only if a component requires `current`.
        mask: [B, T] bool, the decisions that `Algorithm.masks` leave in the surrogate; None before.
        bounds: of the ratio, by `Algorithm.clip`; None before, and where nothing is clipped.
    """

    batch: Batch
    advantages: Tensor
    current: Outputs | None = None
    mask: Tensor | None = None
    bounds: Bounds | None = None

    @property
    def counted(self) -> Tensor:
        """The mask; all decisions where nothing has filled it."""
        return self.batch.sampled if self.mask is None else self.mask

    def select(self, rows: Tensor) -> "MiniBatch":
        """Keep the given rows in the given order."""
        batch = self.batch.select(rows)
        width = batch.tokens.shape[1]
        return MiniBatch(
            batch,
            self.advantages[rows, :width],
            None if self.current is None else self.current.select(rows, width),
            None if self.mask is None else self.mask[rows, :width],
            None if self.bounds is None else self.bounds.select(rows, width),
        )


Weights = tuple[Tensor, Tensor]  # [B, T] and the count to divide by
Coefficient = Callable[[Context], float]
Select = Callable[[Sequence[Group], Context], Sequence[Group]]
ShapeReward = Callable[[Episode, Context], Sequence[float]]
Advantage = Callable[[Batch, Context], Tensor]
Transform = Callable[[Tensor, Batch, Context], Tensor]
TokenHook = Callable[[MiniBatch, Context], Tensor]
Clip = Callable[[MiniBatch, Context], Bounds]
Ratio = Callable[[Outputs, MiniBatch], Tensor]
Surrogate = Callable[[Outputs, MiniBatch, Bounds | None], Tensor]
Aggregation = Callable[[Tensor, Tensor, Tensor], Weights]
TermLoss = Callable[[Outputs, MiniBatch, Context], Tensor]
Diagnostic = Callable[[MiniBatch, Context], Mapping[str, float]]


@dataclass(frozen=True)
class Term:
    """A loss beside the surrogate: coefficient * mean over tokens of `loss`, over all sampled tokens.

    Args:
        name: in the log, as `term/NAME`, without the coefficient.
        loss: -> [B, T].
        coefficient: a number, or a function of the context.
        aggregation: None takes the algorithm's.
    """

    name: str
    loss: TermLoss
    coefficient: float | Coefficient
    aggregation: Aggregation | None = None

    def scale(self, context: Context) -> float:
        return self.coefficient(context) if callable(self.coefficient) else self.coefficient


def requires(*names: str) -> Callable[[F], F]:
    """Declare what a component reads: a function so marked runs only where all of it is provided.

    The learner provides `old_logprobs` and `entropy` ([B, T] of the scoring pass, without gradient),
    `entropy:grad` (`Outputs.entropies` with gradient) and `current`; with a reference policy `reference`;
    with a value head `values` ([B, T] of the scoring pass), `last_values` and `values:grad`. An engine
    provides `rollout:entropy` where it records entropies, for a `BranchPolicy` that goes by them.
    """
    return _marked(REQUIRES, names)


def trait(*names: str) -> Callable[[F], F]:
    """Say what a component is, for others to exclude: "token advantage", "sequence ratio", ..."""
    return _marked(TRAITS, names)


def excludes(**reasons: str) -> Callable[[F], F]:
    """Say which traits of other components make nonsense of this one, and why.

    Names are those of `trait`, with an underscore for a space.
    """

    def mark(component: F) -> F:
        setattr(component, EXCLUDES, {name.replace("_", " "): why for name, why in reasons.items()})
        return component

    return mark


def _marked(kind: str, names: Iterable[str]) -> Callable[[F], F]:
    def mark(component: F) -> F:
        setattr(component, kind, frozenset(names))
        return component

    return mark


def requirements(component: object) -> frozenset[str]:
    """What a component declared, itself or through `functools.partial`."""
    return frozenset(declarations(component, REQUIRES))


def traits(component: object) -> frozenset[str]:
    """Return what a component said that it is, itself or through `functools.partial`."""
    return frozenset(declarations(component, TRAITS))


def declarations(component: object, kind: str) -> Any:
    """Return what a component declared of a kind, itself or through `functools.partial`."""
    while isinstance(component, partial) and not hasattr(component, kind):
        component = component.func
    return getattr(component, kind, ())


def given(values: Tensor | None, name: str) -> Tensor:
    """Read an optional field of a batch or of outputs.

    Raises:
        RequirementError: when nothing filled it.
    """
    if values is None:
        raise RequirementError(f"{name} is empty; a component that reads it is marked @requires({name!r})")
    return values
