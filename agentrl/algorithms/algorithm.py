"""What an algorithm is: a record of functions over [B, T]. Every slot defaults to plain GRPO.

A method sets the slots in which it differs:

    Algorithm(transforms=(modulate_by_turn_entropy,))

Order of a training step: `select` and `shape_reward` (see `prepare`), one scoring pass, `advantage`,
`transforms`; then per mini-batch `masks`, `weights`, `clip`; per micro-batch `surrogate` and `terms`;
`diagnostics` last.
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
from agentrl.data.trajectory import Episode, Group
from agentrl.errors import RequirementError

F = TypeVar("F", bound=Callable[..., Any])
_REQUIRES = "requires"

SCORED = frozenset({"old_logprobs", "entropy", "reference"})  # filled in by the scoring pass
EQUAL_RETURNS = 1e-9  # returns that differ by less are the same outcome


@dataclass(frozen=True)
class Context:
    """State across steps, as hooks see it.

    Args:
        step: of training, from 0.
        total_steps: how many there will be.
        history: past per-step values of every logged scalar, oldest first.
    """

    step: int = 0
    total_steps: int = 1
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """What a policy says about every token: 0 where not sampled."""

    logprobs: Tensor  # [B, T] float, nats
    entropies: Tensor  # [B, T] float, nats


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimiser step, or of a part of it.

    Args:
        batch: the rows.
        advantages: [B, T], final: transformed, without gradient, 0 where not sampled.
        current: what the policy says now, without gradient; only if a component requires `current`.
    """

    batch: Batch
    advantages: Tensor
    current: Outputs | None = None

    def select(self, rows: Tensor) -> "MiniBatch":
        """Keep the given rows in the given order."""
        batch = self.batch.select(rows)
        width = batch.tokens.shape[1]
        current = self.current
        if current is not None:
            current = Outputs(current.logprobs[rows, :width], current.entropies[rows, :width])
        return MiniBatch(batch, self.advantages[rows, :width], current)


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


@dataclass(frozen=True)
class RolloutPlan:
    """What an algorithm asks of the rollout; a collector that cannot do it refuses before the first episode.

    Args:
        temperature: of sampling, by step; None leaves it to the configuration.
        allocate: (task, episodes so far, context) -> how many more episodes to play; requires `allocation`.
        branch: (episode so far, context) -> whether to fork here; requires `branching`.
        perturb: (observation, context) -> the observation shown instead; requires `perturbation`.
    """

    temperature: Coefficient | None = None
    allocate: Callable[[str, Sequence[Episode], Context], int] | None = None
    branch: Callable[[Episode, Context], bool] | None = None
    perturb: Callable[[str, Context], str] | None = None

    @property
    def requires(self) -> frozenset[str]:
        named = {
            "temperature schedule": self.temperature,
            "allocation": self.allocate,
            "branching": self.branch,
            "perturbation": self.perturb,
        }
        return frozenset(name for name, hook in named.items() if hook is not None)


class Replay(Protocol):
    """A memory of groups; its state is part of a checkpoint."""

    def keep(self, groups: Sequence[Group], context: Context) -> None:
        """Look at a step's groups after its update."""

    def recall(self, context: Context) -> Sequence[Group]:
        """Groups to learn from in addition; empty while there is nothing worth it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def requires(*names: str) -> Callable[[F], F]:
    """Declare what a component reads: a function so marked runs only where all of it is provided.

    The learner provides `old_logprobs` and `entropy` ([B, T] of the scoring pass, without gradient),
    `entropy:grad` (`Outputs.entropies` with gradient), `current`, and `reference` where it holds a reference
    policy.
    """

    def mark(component: F) -> F:
        setattr(component, _REQUIRES, frozenset(names))
        return component

    return mark


def requirements(component: object) -> frozenset[str]:
    """What a component declared, itself or through `functools.partial`."""
    if isinstance(component, partial):
        return requirements(component.func)
    return frozenset(getattr(component, _REQUIRES, ()))


def given(values: Tensor | None, name: str) -> Tensor:
    """Read an optional field of a batch.

    Raises:
        RequirementError: when nothing filled it.
    """
    if values is None:
        raise RequirementError(
            f"Batch.{name} is empty; a component that reads it is marked @requires({name!r})"
        )
    return values


def drop_equal_returns(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep the groups that teach something: two finished episodes at least, with different returns."""
    return [group for group in groups if _differ([episode.episode_return for episode in group.finished])]


def keep_all(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep every group."""
    return groups


def group_advantage(
    batch: Batch, context: Context, *, divide_by_std: bool = True, weighting: str = "trajectory"
) -> Tensor:
    """Each trajectory's return, centred within its group; [B, T]. See `group_relative_advantage`."""
    copies = None
    if weighting == "row":
        copies = torch.tensor([len(episode.turns) for episode in batch.episodes], device=batch.tokens.device)
    values = functional.group_relative_advantage(
        batch.returns, batch.groups, divide_by_std=divide_by_std, copies=copies
    )
    return functional.spread(values.float(), batch.trajectory, batch.sampled)


def symmetric_clip(mini: MiniBatch, context: Context) -> Bounds:
    """Ratios within [0.8, 1.2]."""
    return Bounds(0.8, 1.2)


def clipped_policy_loss(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """The clipped surrogate of the ratio to the scoring pass; [B, T]."""
    old = given(mini.batch.old_logprobs, "old_logprobs")
    ratio = functional.probability_ratio(outputs.logprobs, old)
    if bounds is None:
        return -mini.advantages * ratio
    return functional.clipped_surrogate(ratio, mini.advantages, bounds.lower, bounds.upper, bounds.dual)


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
        transforms: likewise. (advantages, batch, context) -> [B, T]
        masks: tokens that stay in the surrogate; they CHANGE its normaliser. (mini-batch, context) -> [B, T]
            bool
        weights: factors of the surrogate; they do NOT change its normaliser. (mini-batch, context) -> [B, T]
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
    transforms: tuple[Transform, ...] = ()
    masks: tuple[TokenHook, ...] = ()
    weights: tuple[TokenHook, ...] = ()
    clip: Clip | None = symmetric_clip
    surrogate: Surrogate = clipped_policy_loss
    aggregation: Aggregation = functional.sequence_weights
    terms: tuple[Term, ...] = ()
    replay: Replay | None = None
    diagnostics: tuple[Diagnostic, ...] = (rollout_gap,)

    @property
    def requires(self) -> frozenset[str]:
        """The union of what its components declare."""
        return frozenset().union(*(names for _, names in self.declared()))

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
            elif slot == "replay":
                yield slot, requirements(component) | {"replay"}
            else:
                yield slot, requirements(component)


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
    algorithm: Algorithm, groups: Sequence[Group], context: Context, *, layout: Layout = "trajectory"
) -> Batch:
    """Turn a step's groups into what is learned from: select, shape rewards, collate.

    Selection sees the environment's rewards; the batch and its episodes hold the shaped ones.
    """
    kept = algorithm.select(groups, context)
    for shape in algorithm.shape_reward:
        kept = [
            replace(group, episodes=tuple(_shaped(episode, shape, context) for episode in group.episodes))
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


def _checked(slot: str, values: Tensor, batch: Batch) -> Tensor:
    if values.shape != batch.tokens.shape:
        raise ValueError(
            f"algorithm.{slot} returned shape {tuple(values.shape)}, wanted {tuple(batch.tokens.shape)}"
        )
    return values


def _shaped(episode: Episode, shape: ShapeReward, context: Context) -> Episode:
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
