"""Inputs and outputs of an algorithm's hooks, and the declarations of what a hook needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast

from torch import Tensor

from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode, Group, Turn
from agentrl.errors import RequirementError

F = TypeVar("F", bound=Callable[..., Any])
REQUIRES, TRAITS, EXCLUDES = "requires", "traits", "excludes"
SCORED = frozenset(
    {"old_logprobs", "entropy", "reference", "teacher", "values", "observation_kl"}
)  # results of the scoring pass
SCHEDULED = "schedule over all steps"  # a trait: it reads `Context.total_steps`
COMPARES = "comparison within a group"  # a trait: an episode alone in its group gives no signal
BRANCHES = "branches"  # a trait of a branch policy: episodes share the beginning of others
STEERS_ENTROPY = "entropy control"  # a trait: it moves the entropy towards a target
TOKEN_TRANSFORM = "token transform"  # a trait of a transform: tokens of one turn may differ after it
ADAPTIVE_BOUNDS = "adaptive bounds"  # a trait: a clip that finds its bounds in each mini-batch


@dataclass(frozen=True)
class Context:
    """State across training steps, as hooks see it.

    Args:
        step: The training step, from 0.
        total_steps: The number of training steps that schedules are computed over. Mark a hook that reads it
            with `@trait(SCHEDULED)`, so that no run is resumed with another number.
        history: Past per-step values of every logged metric, oldest first, by its key in the log; see
            `past`. A step that did not log the metric has no entry.
        seed: The seed of the run. A random draw uses `derive_seed(context.seed, ...)` with what the draw is
            for.
        vocabulary: The size of the policy's vocabulary, to express entropies in units of its logarithm.
        tokenizer: The fingerprint of the policy's tokenizer. Token ids are valid under this one only.
        score: Maps an episode to the learner's log-probability in nats of each reply token, by turn, at the
            temperature of the token; only for a `BranchPolicy` that requires `rollout:scores`.
        token_text: The text of a token, empty for a special one; None if there is no tokenizer.
    """

    step: int = 0
    total_steps: int = 1
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seed: int = 0
    vocabulary: int = 0
    tokenizer: str = ""
    score: "ScoreEpisode | None" = field(default=None, repr=False, compare=False)
    token_text: Callable[[int], str] | None = None

    def past(self, name: str) -> Sequence[float]:
        """Return the past values of a diagnostic of the algorithm, by the name that it reports."""
        return self.history.get(f"train/algorithm/{name}", ())


@dataclass(frozen=True)
class Outputs:
    """Output of a policy for every token; 0 where not sampled."""

    logprobs: Tensor  # [B, T] float, nats
    entropies: Tensor  # [B, T] float, nats
    values: Tensor | None = None  # [B, T] float, expected return before the token; with a value head
    ratio: Tensor | None = None  # [B, T] float, new over old probability, by `Algorithm.ratio`
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # [B, T] or [B, T, k]; see `token_statistic`

    def select(self, rows: Tensor, width: int) -> "Outputs":
        """Return the given rows, cut to a width."""
        values, ratio = (None if kept is None else kept[rows, :width] for kept in (self.values, self.ratio))
        extras = {name: kept[rows, :width] for name, kept in self.extras.items()}
        return Outputs(self.logprobs[rows, :width], self.entropies[rows, :width], values, ratio, extras)


@dataclass(frozen=True)
class Bounds:
    """Bounds of the ratio of new to old probability, beyond which `surrogate` gives no gradient."""

    lower: Tensor | float  # [B, T] or a number
    upper: Tensor | float
    dual: Tensor | float | None = None

    def select(self, rows: Tensor, width: int) -> "Bounds":
        """Return the given rows, cut to a width."""

        def part(bound: Tensor | float) -> Tensor | float:
            return bound[rows, :width] if isinstance(bound, Tensor) and bound.dim() else bound

        return Bounds(part(self.lower), part(self.upper), None if self.dual is None else part(self.dual))


@dataclass(frozen=True)
class MiniBatch:
    """Rows of one optimiser step, or of a part of it.

    The objective fills in `mask`, `current.ratio` and `bounds` in this order, each before it calls the next
    slot. Diagnostics and `Stateful.update` see the mask of the whole rollout batch.

    Args:
        batch: The rows.
        advantages: [B, T], final: transformed, without gradient, 0 where not sampled.
        current: The output of the current policy, without gradient; only if a component requires `current`.
        mask: [B, T] bool, the action tokens that `Algorithm.masks` leave in the surrogate; None before that.
        bounds: The bounds that `Algorithm.clip` returned; None before that, and if nothing is clipped.
        features: Required features of the mini-batch, filled in after the ratio and before the bounds; see
            `agentrl.algorithms.named_features`. Those of the rollout batch are in `batch.features`.
    """

    batch: Batch
    advantages: Tensor
    current: Outputs | None = None
    mask: Tensor | None = None
    bounds: Bounds | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)  # [B, T, ...] by name

    @property
    def now(self) -> Outputs:
        """Return the output of the current policy.

        Raises:
            RequirementError: If no component requires `current`.
        """
        if self.current is None:
            raise RequirementError(
                "MiniBatch.current is empty; mark the component that reads it with @requires('current')"
            )
        return self.current

    @property
    def counted(self) -> Tensor:
        """Return the mask, or all action tokens if it is not filled in."""
        return self.batch.action_mask if self.mask is None else self.mask

    def select(self, rows: Tensor) -> "MiniBatch":
        """Return the given rows in the given order."""
        batch = self.batch.select(rows)
        width = batch.tokens.shape[1]
        return MiniBatch(
            batch,
            self.advantages[rows, :width],
            None if self.current is None else self.current.select(rows, width),
            None if self.mask is None else self.mask[rows, :width],
            None if self.bounds is None else self.bounds.select(rows, width),
            {name: values[rows, :width] for name, values in self.features.items()},
        )


@dataclass(frozen=True)
class ReplyState:
    """State of an episode before its next reply is sampled.

    Args:
        task: The id of the task.
        episode: The id of the episode.
        member: The index of the episode in its group, from 0.
        turn: The index of the turn, from 0.
        previous: The turn before it, with the entropies of its tokens; None in the first.
        temperature: The temperature of the step, of the configuration or of `RolloutPlan.temperature`.
    """

    task: str
    episode: str
    member: int
    turn: int
    previous: Turn | None
    temperature: float


@dataclass(frozen=True)
class TokenTemperature:
    """Temperature that follows, within a reply, from the entropy of the last decision.

    Args:
        first: The temperature of the reply's first decision.
        following: (entropy of the decision before, in nats, at its own temperature) -> temperature.
    """

    first: float
    following: Callable[[float], float]


ScoreEpisode = Callable[[Episode], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class SampledReply:
    """A reply before the environment sees it.

    Args:
        entropies: Those of its decisions, in nats.
        confidences: The mean -log p of the most likely tokens at each decision, in nats; see `RolloutPlan`.
    """

    entropies: Sequence[float]
    confidences: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """Decision of a turn gate.

    Args:
        accept: Whether the reply is given to the environment; otherwise another one is sampled.
        score: A number that is kept of an accepted reply, in `gate_score` of the turn's info.
    """

    accept: bool
    score: float


Weights = tuple[Tensor, Tensor]  # [B, T], and the count that divides their sum
Coefficient = Callable[[Context], float]
ReplyTemperature = Callable[[ReplyState, Context], float | TokenTemperature]
TurnGate = Callable[[ReplyState, SampledReply, Context], Verdict]
EndThoughts = Callable[[Sequence[float], Sequence[float], Context], bool]
Select = Callable[[Sequence[Group], Context], Sequence[Group]]
ShapeReward = Callable[[Episode, Context], Sequence[float]]
ShapeGroup = Callable[[Group, Context], Sequence[Sequence[float]]]
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
    """Loss beside the surrogate: coefficient * mean over all action tokens of [selected] * `loss`.

    Args:
        name: The name in the log, as `term/NAME`; the logged value excludes the coefficient.
        loss: (outputs, mini-batch, context) -> [B, T].
        coefficient: A number, or a function of the context.
        aggregation: How tokens are averaged; None takes the algorithm's aggregation.
        where: Selects the action tokens on which the term acts, once per mini-batch, which then has its mask,
            its current ratio and its bounds: (mini-batch, context) -> [B, T] bool. The loss of the others is
            0, and they still count in the normaliser. Numbers instead of bool weigh the tokens. None selects
            all.
        target: If given, the loss is (mean - target)^2 instead of the mean over the tokens of a mini-batch.
    """

    name: str
    loss: TermLoss
    coefficient: float | Coefficient
    aggregation: Aggregation | None = None
    where: TokenHook | None = None
    target: float | Coefficient | None = None

    def scale(self, context: Context) -> float:
        """Return the coefficient of this step."""
        return self.coefficient(context) if callable(self.coefficient) else self.coefficient

    def distance(self, mean: Tensor, context: Context) -> Tensor:
        """Return by how much a mean of the term is above its target."""
        return mean - (self.target(context) if callable(self.target) else self.target or 0.0)


@dataclass(frozen=True)
class GroupValues:
    """The N trajectories of a group, as a loss that couples them sees them.

    Aborted episodes and trajectories without an action token are left out.

    Args:
        logprobs: [N] float64, nats, the sum over the action tokens of a trajectory under the current policy.
            The loss is differentiated by them.
        tokens: [N] int64, the number of action tokens, at least 1.
        returns: [N] float64, the shaped returns.
        episodes: The N episodes.
    """

    logprobs: Tensor
    tokens: Tensor
    returns: Tensor
    episodes: tuple[Episode, ...]


GroupLoss = Callable[[GroupValues, Context], Tensor]


@dataclass(frozen=True)
class GroupTerm:
    """Loss beside the surrogate that couples the trajectories of a group: coefficient * mean over groups.

    Args:
        name: The name in the log, as `term/NAME`; the logged value excludes the coefficient.
        loss: (values of a group, context) -> a number that can be differentiated by the log-probabilities.
        coefficient: A number, or a function of the context.
    """

    name: str
    loss: GroupLoss
    coefficient: float | Coefficient = 1.0

    def scale(self, context: Context) -> float:
        """Return the coefficient of this step."""
        return self.coefficient(context) if callable(self.coefficient) else self.coefficient


def requires(*names: str) -> Callable[[F], F]:
    """Declare what a component reads. The component runs only if the run provides all of it.

    The learner provides `old_logprobs` and `entropy` ([B, T] of the scoring pass, without gradient),
    `entropy:grad` (`Outputs.entropies` with gradient) and `current`; with a reference policy `reference`;
    with a teacher `teacher` (`Batch.teacher_logprobs`) and `teacher_divergence:1.0:grad`; for an algorithm
    with a `RewardModel` `reward_model` (`Batch.reward_logprobs`); with a value head `values` ([B, T] of the
    scoring pass), `last_values` and `values:grad`; with a tokenizer and an `Algorithm.view` `observation_kl`,
    which `token_statistic` reads from the batch. An engine that records entropies provides `rollout:entropy`,
    for a `BranchPolicy` or a `ReplyTemperature` that reads them; the torch engine in this process provides
    `rollout:token_temperature`, for a `ReplyTemperature` that returns a `TokenTemperature`, and
    `rollout:confidence`, for `TurnGate` and `EndThoughts`. A run whose learner waits for its rollouts
    provides `rollout:scores`, which is `Context.score` of a `BranchPolicy`. Names such as `topk:10` and
    `topk:10:grad` ask for statistics of each token's distribution; see `token_statistic`. Names such as
    `states` and `turn_entropy` ask for features of the batch, which every learner can compute; see
    `agentrl.algorithms.named_features`.

    Where a name depends on a hyper-parameter, mark a `functools.partial` or a bound method of the hook. Names
    add to those that the component declares itself.
    """
    return _marked(REQUIRES, names)


def trait(*names: str) -> Callable[[F], F]:
    """Declare a property of a component that others may exclude: "token advantage", "sequence ratio", ..."""
    return _marked(TRAITS, names)


def excludes(**reasons: str) -> Callable[[F], F]:
    """Declare the traits of other components that this one cannot be combined with, and why.

    Names are those of `trait`, with an underscore for a space. A component may exclude a trait of its own, so
    that there is only one with it.
    """

    def mark(component: F) -> F:
        setattr(component, EXCLUDES, {name.replace("_", " "): why for name, why in reasons.items()})
        return component

    return mark


def steers_entropy(component: F) -> F:
    """Declare that a component moves the entropy towards a target; an algorithm has at most one of them."""
    marked = trait(STEERS_ENTROPY)(component)
    return excludes(entropy_control="two targets of the entropy would work against each other")(marked)


def declared_like(other: object) -> Callable[[F], F]:
    """Declare all that another component declares, for one that calls it."""

    def mark(component: F) -> F:
        both = dict(declarations(component, EXCLUDES)) | dict(declarations(other, EXCLUDES))
        marked = trait(*traits(other))(requires(*requirements(other))(component))
        setattr(marked, EXCLUDES, both)
        return marked

    return mark


def _marked(kind: str, names: Iterable[str]) -> Callable[[F], F]:
    def mark(component: F) -> F:
        declared = frozenset(names) | frozenset(declarations(component, kind))
        # A bound method takes no attributes, and those of its function would be those of all instances.
        marked: Any = partial(component) if isinstance(component, MethodType) else component
        setattr(marked, kind, declared)
        return cast(F, marked)

    return mark


def requirements(component: object) -> frozenset[str]:
    """Return the requirements that a component declared, itself or through `functools.partial`."""
    return frozenset(declarations(component, REQUIRES))


def traits(component: object) -> frozenset[str]:
    """Return the traits that a component declared, itself or through `functools.partial`."""
    return frozenset(declarations(component, TRAITS))


def declarations(component: object, kind: str) -> Any:
    """Return the declarations of one kind of a component, its own or those below `functools.partial`."""
    while isinstance(component, partial) and not hasattr(component, kind):
        component = component.func
    return getattr(component, kind, ())


def require_tensor(values: Tensor | None, name: str) -> Tensor:
    """Return an optional field of a batch or of outputs, or raise if it is empty.

    Raises:
        RequirementError: If nothing filled the field.
    """
    if values is None:
        raise RequirementError(f"{name} is empty; mark the component that reads it with @requires({name!r})")
    return values


def token_statistic(source: Batch | Outputs, name: str) -> Tensor:
    """Return a statistic that a component requires by name, at every token; 0 where not sampled.

    A component that requires `topk:10` reads it from the batch, as the scoring pass saw the policy, and from
    `MiniBatch.current` if it requires `current` too. One that requires `topk:10:grad` reads it from the
    outputs that a surrogate, ratio or term is given, with gradient. `agentrl.algorithms.token_statistics`
    defines the statistics.

    Args:
        source: The batch or the outputs.
        name: The name, with its argument and without `:grad`.

    Returns:
        [B, T], or [B, T, k] for a statistic of k numbers.

    Raises:
        RequirementError: If no component requires it.
    """
    if name not in source.extras:
        asked = name if isinstance(source, Batch) else f"{name}:grad"
        raise RequirementError(
            f"{name} is not among the statistics of {'this batch' if asked == name else 'these outputs'} "
            f"({', '.join(source.extras) or 'none'}); mark the component that reads it with "
            f"@requires({asked!r})"
        )
    return source.extras[name]
