"""What an algorithm is: a record of functions over [B, T]. Every slot defaults to plain GRPO.

A method sets the slots in which it differs:

    Algorithm(transforms=(modulate_by_turn_entropy,))

Order of a training step: `rollout`, `select` and `shape_reward` (see `prepare`), one scoring pass,
`targets`, `advantage`, `transforms`; then per mini-batch `masks`, `ratio` (of what the policy says now),
`clip`, `aggregation`, `weights`; per micro-batch `ratio`, `surrogate` and `terms`; then `replay`;
`diagnostics` last. A mini-batch carries what came of the slots before (`mask`, `current.ratio`, `bounds`): a
hook reads it there, and never keeps a slot of the recipe that it was built over, which may be replaced.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.recipe import Recipe as Recipe
from agentrl.algorithms.recipe import build_recipe as build_recipe
from agentrl.algorithms.recipe import recipe as recipe
from agentrl.algorithms.recipe import recipe_names as recipe_names
from agentrl.data.batch import Batch, Layout, collate
from agentrl.data.trajectory import BranchPoint, Episode, Group, Turn
from agentrl.errors import ConfigError, RequirementError

F = TypeVar("F", bound=Callable[..., Any])
_REQUIRES, _TRAITS, _EXCLUDES = "requires", "traits", "excludes"

SCORED = frozenset({"old_logprobs", "entropy", "reference", "values"})  # filled in by the scoring pass
COMPARES = "comparison within a group"  # a trait: an episode that is alone in its group teaches nothing
EQUAL_RETURNS = 1e-9  # returns that differ by less are the same outcome


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
    bounds: "Bounds | None" = None

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


class BranchPolicy(Protocol):
    """Which episodes one task gets, decided while they are played.

    A start is None for an episode from the first observation, or the point of another episode at which the
    new one leaves it: `BranchPoint(parent, turn, token)` begins in the state before that turn, with that many
    tokens of the parent's reply. The rollout names the episodes, never starts more than the budget, and fills
    up with episodes from the first observation when all have ended and some are left.
    """

    def begin(self) -> Sequence[BranchPoint | None]:
        """What is started first."""
        ...

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """What is started when the environment has answered the last of `turns` and the episode goes on.

        `turns` are those since the first observation, the parent's included.
        """
        ...

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """What is started when an episode has ended, for good or aborted."""
        ...


BranchPolicyFactory = Callable[[int, int, Context], BranchPolicy]


@dataclass(frozen=True)
class RolloutPlan:
    """What an algorithm asks of the rollout.

    Args:
        temperature: of sampling, by step; None leaves it to the configuration.
        rounds: times that a step's tasks are drawn and played at most, until `select` has kept as many
            groups as the configuration wants; the last round's groups all fill up what is missing.
        episodes: of each task; None takes the configuration's group size.
        branch_policy: (episodes of the task, seed, context) -> which they are; None starts all from the first
            observation.
    """

    temperature: Coefficient | None = None
    rounds: int = 1
    episodes: int | None = None
    branch_policy: BranchPolicyFactory | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What is learned from again.

    Args:
        batch: `old_logprobs` are those of its first time, so that ratios are to the policy that acted.
        advantages: [B, T], final.
        algorithm: of its loss: masks, weights, clip, ratio, surrogate, aggregation. The rest is not asked.
        coefficient: of its loss, above 0.
        mixed: a part of it in every optimiser step of the rollout batch; else in steps of its own, after
            those.
    """

    batch: Batch
    advantages: Tensor
    algorithm: "Algorithm"
    coefficient: float = 1.0
    mixed: bool = False


class Replay(Protocol):
    """A memory of what was learned from; its state is part of a checkpoint."""

    def recall(self, context: Context) -> Rehearsal | None:
        """What to learn from in this step, beside the rollout batch."""
        ...

    def keep(self, rollout: MiniBatch, context: Context) -> None:
        """Look at a step's scored rollout batch and its advantages, after its updates."""
        ...

    def numbers(self) -> Mapping[str, float]:
        """What to log of the step, after `keep`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text, in dicts and lists."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Take up a state; `CheckpointError` when it does not fit, as with another tokenizer."""
        ...


def requires(*names: str) -> Callable[[F], F]:
    """Declare what a component reads: a function so marked runs only where all of it is provided.

    The learner provides `old_logprobs` and `entropy` ([B, T] of the scoring pass, without gradient),
    `entropy:grad` (`Outputs.entropies` with gradient) and `current`; with a reference policy `reference`;
    with a value head `values` ([B, T] of the scoring pass), `last_values` and `values:grad`. An engine
    provides `rollout:entropy` where it records entropies, for a `BranchPolicy` that goes by them.
    """
    return _marked(_REQUIRES, names)


def trait(*names: str) -> Callable[[F], F]:
    """Say what a component is, for others to exclude: "token advantage", "sequence ratio", ..."""
    return _marked(_TRAITS, names)


def excludes(**reasons: str) -> Callable[[F], F]:
    """Say which traits of other components make nonsense of this one, and why.

    Names are those of `trait`, with an underscore for a space.
    """

    def mark(component: F) -> F:
        setattr(component, _EXCLUDES, {name.replace("_", " "): why for name, why in reasons.items()})
        return component

    return mark


def _marked(kind: str, names: Iterable[str]) -> Callable[[F], F]:
    def mark(component: F) -> F:
        setattr(component, kind, frozenset(names))
        return component

    return mark


def requirements(component: object) -> frozenset[str]:
    """What a component declared, itself or through `functools.partial`."""
    return frozenset(_declared(component, _REQUIRES))


def traits(component: object) -> frozenset[str]:
    """Return what a component said that it is, itself or through `functools.partial`."""
    return frozenset(_declared(component, _TRAITS))


def _declared(component: object, kind: str) -> Any:
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


@trait(COMPARES)
def drop_equal_returns(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep the groups that teach something: two finished episodes at least, with different returns."""
    return [group for group in groups if _differ([episode.episode_return for episode in group.finished])]


def keep_all(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep every group."""
    return groups


def group_advantage(batch: Batch, context: Context) -> Tensor:
    """Each trajectory's return, centred within its group; [B, T]. See `group_relative_advantage`."""
    values = functional.group_relative_advantage(batch.returns, batch.groups)
    return functional.spread(values.float(), batch.trajectory, batch.sampled)


def symmetric_clip(mini: MiniBatch, context: Context) -> Bounds:
    """Ratios within [0.8, 1.2]."""
    return Bounds(0.8, 1.2)


def clipped_policy_loss(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """The clipped surrogate of the ratio to the scoring pass; [B, T]."""
    ratio = given(outputs.ratio, "ratio")
    if bounds is None:
        return -mini.advantages * ratio
    return functional.clipped_surrogate(ratio, mini.advantages, bounds.lower, bounds.upper, bounds.dual)


def token_ratio(outputs: Outputs, mini: MiniBatch) -> Tensor:
    """New over old probability of each token; [B, T]."""
    return functional.probability_ratio(outputs.logprobs, given(mini.batch.old_logprobs, "old_logprobs"))


def held_back(mini: MiniBatch, outputs: Outputs) -> Tensor:
    """Mark where the bounds of a mini-batch stop a ratio, the dual clip not counted; [B, T] bool."""
    if mini.bounds is None:
        return torch.zeros_like(mini.batch.sampled)
    ratio = given(outputs.ratio, "ratio").detach()
    return functional.clipped(ratio, mini.advantages, mini.bounds.lower, mini.bounds.upper)


@requires("old_logprobs")
def rollout_gap(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """How far the learner's logprobs are from those the episodes were sampled with, in nats."""
    batch = mini.batch
    gap = torch.where(batch.sampled, given(batch.old_logprobs, "old_logprobs") - batch.logprobs, 0.0).abs()
    return {
        "logprob_gap_max": float(gap.max()) if gap.numel() else 0.0,
        "logprob_gap_mean": float(functional.masked_mean(gap, batch.sampled)),
    }


@dataclass(frozen=True)
class Algorithm:
    """One function, or one tuple of functions, per slot.

    Args:
        select: which groups stay. (groups, context) -> groups
        rollout: what is asked of the rollout.
        shape_reward: (episode, context) -> reward per turn; each sees the episode as the one before left it.
        advantage: over the whole rollout batch. (batch, context) -> [B, T]
        targets: what values are to become, likewise, into `Batch.targets`. (batch, context) -> [B, T]
        transforms: likewise. (advantages, batch, context) -> [B, T]
        masks: tokens that stay in the surrogate; they CHANGE its normaliser. (mini-batch, context) -> [B, T]
            bool
        weights: factors of the surrogate; they do NOT change its normaliser. (mini-batch, context) -> [B, T]
        ratio: of new to old probability. (outputs, mini-batch) -> [B, T], with gradient
        clip: bounds of the ratio. (mini-batch, context) -> Bounds; None when `surrogate` takes no ratio.
        surrogate: the policy loss. (outputs, mini-batch, bounds) -> [B, T]
        aggregation: (mask, turns, trajectory) -> weights [B, T] and the count that divides their sum.
        terms: losses beside the surrogate.
        replay: what is kept across steps.
        diagnostics: numbers to log. (rollout batch with advantages, context) -> by name
    """

    select: Select = drop_equal_returns
    rollout: RolloutPlan = RolloutPlan()
    shape_reward: tuple[ShapeReward, ...] = ()
    advantage: Advantage = group_advantage
    targets: Advantage | None = None
    transforms: tuple[Transform, ...] = ()
    masks: tuple[TokenHook, ...] = ()
    weights: tuple[TokenHook, ...] = ()
    ratio: Ratio = token_ratio
    clip: Clip | None = symmetric_clip
    surrogate: Surrogate = clipped_policy_loss
    aggregation: Aggregation = functional.sequence_weights
    terms: tuple[Term, ...] = ()
    replay: Replay | None = None
    diagnostics: tuple[Diagnostic, ...] = (rollout_gap,)

    def __post_init__(self) -> None:
        contradictions = [
            f"{slot} does not go with {other_slot}: {why} ({_called(component)}, {_called(other)})"
            for slot, component in self.components()
            for name, why in dict(_declared(_hook(component), _EXCLUDES)).items()
            for other_slot, other in self.components()
            if name in _declared(_hook(other), _TRAITS)
        ]
        if contradictions:
            raise ConfigError("; ".join(contradictions))

    @property
    def requires(self) -> frozenset[str]:
        """The union of what its components declare."""
        return frozenset().union(*(names for _, names in self.declared()))

    @property
    def compares(self) -> bool:
        """Whether it learns from how the episodes of a group differ."""
        return COMPARES in traits(self.select) | traits(self.advantage)

    @property
    def reads_scores(self) -> bool:
        """Whether a component before or inside the update reads the scoring pass, not counting the ratio."""
        return any(names & SCORED for slot, names in self.declared() if slot != "diagnostics")

    def components(self) -> Iterable[tuple[str, object]]:
        """Every filled slot, as (slot, function or record)."""
        for item in fields(self):
            value = getattr(self, item.name)
            for component in value if isinstance(value, tuple) else (value,):
                if component is not None:
                    yield item.name, component

    def declared(self) -> Iterable[tuple[str, frozenset[str]]]:
        """What each component requires, by slot."""
        for slot, component in self.components():
            if isinstance(component, Term):
                yield f"{slot}/{component.name}", requirements(component.loss)
            elif isinstance(component, RolloutPlan):
                yield slot, requirements(component.branch_policy)
            else:
                yield slot, requirements(component)


def _hook(component: object) -> object:
    return component.loss if isinstance(component, Term) else component


def _called(component: object) -> str:
    function = _hook(component)
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def check_requirements(algorithm: Algorithm, provided: Iterable[str]) -> None:
    """Refuse, before the first rollout, an algorithm of which a component would find nothing to work on.

    Raises:
        RequirementError: naming every slot and what it lacks.
    """
    offered = frozenset(provided)
    missing = [
        f"{slot} requires {', '.join(sorted(names - offered))}"
        for slot, names in algorithm.declared()
        if names - offered
    ]
    if missing:
        raise RequirementError(
            f"algorithm: {'; '.join(missing)}; this run provides {', '.join(sorted(offered)) or 'nothing'}"
        )


def prepare(
    algorithm: Algorithm,
    groups: Sequence[Group],
    context: Context,
    *,
    layout: Layout = "trajectory",
    selected: bool = False,
) -> Batch:
    """Turn a step's groups into what is learned from: select (unless `selected`), shape rewards, collate.

    Selection sees the environment's rewards; the batch and its episodes hold the shaped ones.
    """
    kept = groups if selected else algorithm.select(groups, context)
    for shape in algorithm.shape_reward:
        kept = [
            replace(group, episodes=tuple(shaped(episode, shape, context) for episode in group.episodes))
            for group in kept
        ]
    return collate(kept, layout=layout)


def compute_advantages(algorithm: Algorithm, batch: Batch, context: Context) -> Tensor:
    """Advantage and transforms over the whole rollout batch; [B, T], no gradient, 0 where not sampled.

    Raises:
        ValueError: when a hook returns another shape, naming it.
    """
    with torch.no_grad():
        advantages = _checked("advantage", algorithm.advantage(batch, context), batch)
        for transform in algorithm.transforms:
            advantages = _checked("transforms", transform(advantages, batch, context), batch)
    return torch.where(batch.sampled, advantages, 0.0).to(batch.logprobs.dtype)


def with_targets(algorithm: Algorithm, batch: Batch, context: Context) -> Batch:
    """Fill in what values are to become, if the algorithm says; over the whole rollout batch, no gradient."""
    if algorithm.targets is None:
        return batch
    with torch.no_grad():
        targets = _checked("targets", algorithm.targets(batch, context), batch)
    return replace(batch, targets=torch.where(batch.sampled, targets, 0.0).to(batch.logprobs.dtype))


def with_mask(algorithm: Algorithm, mini: MiniBatch, context: Context) -> MiniBatch:
    """Fill in which decisions are in the surrogate.

    Raises:
        ValueError: when a hook returns another shape, naming it.
    """
    with torch.no_grad():
        mask = mini.batch.sampled
        for hook in algorithm.masks:
            mask = mask & _checked("masks", hook(mini, context), mini.batch)
    return replace(mini, mask=mask)


def _checked(slot: str, values: Tensor, batch: Batch) -> Tensor:
    if values.shape != batch.tokens.shape:
        raise ValueError(
            f"algorithm.{slot} returned shape {tuple(values.shape)}, wanted {tuple(batch.tokens.shape)}"
        )
    return values


def shaped(episode: Episode, shape: ShapeReward, context: Context) -> Episode:
    """Give an episode's turns the rewards that `shape` says.

    Raises:
        ValueError: when they are not one per turn.
    """
    rewards = shape(episode, context)
    if len(rewards) != len(episode.turns):
        raise ValueError(
            f"algorithm.shape_reward returned {len(rewards)} rewards for the {len(episode.turns)} turns of "
            f"episode {episode.id!r}"
        )
    turns = (replace(turn, reward=reward) for turn, reward in zip(episode.turns, rewards, strict=True))
    return replace(episode, turns=tuple(turns))


def _differ(returns: Sequence[float]) -> bool:
    return len(returns) > 1 and max(returns) - min(returns) > EQUAL_RETURNS
