"""What an algorithm is: a record of functions over [B, T]. Every slot defaults to plain GRPO.

A method sets the slots in which it differs:

    Algorithm(transforms=(modulate_by_turn_entropy,))

Order of a training step: `rollout`, `select` and `shape_reward` (see `prepare`), one scoring pass,
`targets`, `advantage`, `transforms`; then per mini-batch `masks`, `ratio` (of what the policy says now),
`clip`, `aggregation`, `weights`; per micro-batch `ratio`, `surrogate` and `terms`; then `replay`;
`diagnostics` last. A mini-batch carries what came of the slots before (`mask`, `current.ratio`, `bounds`): a
hook reads it there, and never keeps a slot of the recipe that it was built over, which may be replaced.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.hooks import (
    COMPARES,
    EXCLUDES,
    SCORED,
    TRAITS,
    Advantage,
    Aggregation,
    Bounds,
    Clip,
    Context,
    Diagnostic,
    MiniBatch,
    Outputs,
    Ratio,
    Select,
    ShapeReward,
    Surrogate,
    Term,
    TokenHook,
    Transform,
    declarations,
    given,
    requirements,
    requires,
    trait,
    traits,
)
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Group
from agentrl.errors import ConfigError, RequirementError

EQUAL_RETURNS = 1e-9  # returns that differ by less are the same outcome


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
    rollout: RolloutPlan = field(default_factory=RolloutPlan)
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
            for name, why in dict(declarations(_hook(component), EXCLUDES)).items()
            for other_slot, other in self.components()
            if name in declarations(_hook(other), TRAITS)
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


def _differ(returns: Sequence[float]) -> bool:
    return len(returns) > 1 and max(returns) - min(returns) > EQUAL_RETURNS


def __getattr__(name: str) -> Any:
    """Find a name that other packages may still import from here, although it has moved."""
    for home in ("hooks", "branching", "credit", "recipe"):
        module = import_module(f"agentrl.algorithms.{home}")
        if not name.startswith("_") and hasattr(module, name):
            warnings.warn(
                f"agentrl.algorithms.algorithm.{name} is now agentrl.algorithms.{home}.{name}",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
