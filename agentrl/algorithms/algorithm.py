"""An algorithm as a record of functions over [B, T]. Every slot defaults to plain GRPO.

A method sets the slots in which it differs:

    Algorithm(transforms=(modulate_by_turn_entropy,))

A training step runs the slots in this order: `rollout`, `select`, `shape_reward` and `shape_group` (see
`prepare`), one scoring pass, `reward_model`, `targets`, `advantage`, `transforms`; then, per mini-batch,
`masks`, `ratio` (under the current policy), `clip`, `aggregation`, `weights`, the `where` of `terms` and
`group_terms`; per micro-batch `ratio`, `surrogate` and `terms`; then `replay`; then every stateful component
is updated; and `diagnostics` last. Required features of the batch are computed after the reward model, those
of a mini-batch before `clip`. A mini-batch carries the results of the earlier slots (`mask`, `current.ratio`,
`bounds`). A hook must read them there and must not keep a copy of another slot, because that slot may be
replaced later.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from agentrl.algorithms import answers, entropy_features, functional, states  # noqa: F401 (features register)
from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.hooks import (
    COMPARES,
    EXCLUDES,
    SCHEDULED,
    SCORED,
    TRAITS,
    Advantage,
    Aggregation,
    Bounds,
    Clip,
    Context,
    Diagnostic,
    GroupTerm,
    MiniBatch,
    Outputs,
    Ratio,
    Select,
    ShapeGroup,
    ShapeReward,
    Surrogate,
    Term,
    TokenHook,
    Transform,
    declarations,
    excludes,
    require_tensor,
    requirements,
    requires,
    trait,
    traits,
)
from agentrl.algorithms.named_features import (
    feature_fault,
    features_read_scores,
    is_feature,
    with_sources,
)
from agentrl.algorithms.observation_view import ObservationView
from agentrl.algorithms.reward_model import RewardModel
from agentrl.algorithms.stateful import Stateful, find_stateful, is_stateful
from agentrl.algorithms.token_statistics import (
    STATISTICS,
    TEACHER,
    compares_with_teacher,
    is_statistic,
    reads_statistics,
    statistic_fault,
    statistic_usages,
)
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Group
from agentrl.errors import ConfigError, RequirementError

EQUAL_RETURNS = functional.EQUAL_RETURNS
# The slots that define the loss of a mini-batch's rows, and those that run after the update.
LOSS_SLOTS = ("masks", "ratio", "clip", "surrogate", "aggregation", "weights", "terms")
AFTER_UPDATE = ("diagnostics", "stateful")


@dataclass(frozen=True)
class ReplayBatch:
    """A batch of earlier experience to train on again.

    Args:
        batch: The rows. `old_logprobs` are those of the step that collected them, so ratios are relative to
            the policy that acted.
        advantages: [B, T], final.
        algorithm: (algorithm of the run) -> the algorithm that defines the loss of these rows: its masks,
            ratio, clip, surrogate, aggregation, weights and terms. Its other slots are not used. Slots of the
            run's algorithm must be taken from the argument, because they may be replaced after a replay was
            built.
        coefficient: The factor of the loss, above 0.
        mixed: If true, every optimiser step on the rollout batch also gets a part of these rows. If false,
            they get optimiser steps of their own, after those on the rollout batch.
    """

    batch: Batch
    advantages: Tensor
    algorithm: "ReplayLoss"
    coefficient: float = 1.0
    mixed: bool = False


ReplayLoss = Callable[["Algorithm"], "Algorithm"]


class Replay(Stateful, Protocol):
    """Memory of earlier experience; `update` adds a step's experience to it."""

    def sample(self, context: Context) -> ReplayBatch | None:
        """Return the batch to train on in this step beside the rollout batch, or None."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return the metrics of the step, after `update`."""
        ...


def returns_differ(returns: Sequence[float]) -> bool:
    """Return whether two of the returns differ by more than rounding."""
    return len(returns) > 1 and max(returns) - min(returns) > EQUAL_RETURNS


@trait(COMPARES)
def drop_equal_returns(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep the groups with at least two finished episodes and different returns."""
    return [
        group for group in groups if returns_differ([episode.episode_return for episode in group.finished])
    ]


def keep_all(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep every group."""
    return groups


def group_advantage(batch: Batch, context: Context) -> Tensor:
    """Centre each trajectory's return within its group; [B, T]. See `group_relative_advantage`."""
    values = functional.group_relative_advantage(batch.returns, batch.groups)
    return functional.broadcast_to_tokens(values.float(), batch.trajectory, batch.action_mask)


def symmetric_clip(mini: MiniBatch, context: Context) -> Bounds:
    """Bound ratios to [0.8, 1.2]."""
    return Bounds(0.8, 1.2)


def clipped_policy_loss(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Return the clipped surrogate of the ratio; [B, T]."""
    ratio = require_tensor(outputs.ratio, "ratio")
    if bounds is None:
        return -mini.advantages * ratio
    return functional.clipped_surrogate(ratio, mini.advantages, bounds.lower, bounds.upper, bounds.dual)


@excludes(sequence_ratio="it bounds the ratio of single tokens, not of a sequence")
def stop_gradient_policy_loss(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Return the value of the clipped surrogate, with a gradient above the upper bound; [B, T]."""
    if bounds is None:
        return clipped_policy_loss(outputs, mini, None)
    return functional.stop_gradient_clipped_surrogate(
        require_tensor(outputs.ratio, "ratio"), mini.advantages, bounds.lower, bounds.upper, bounds.dual
    )


def token_ratio(outputs: Outputs, mini: MiniBatch) -> Tensor:
    """Return the new over the old probability of each token; [B, T]."""
    return functional.probability_ratio(
        outputs.logprobs, require_tensor(mini.batch.old_logprobs, "old_logprobs")
    )


def clipped_tokens(mini: MiniBatch, outputs: Outputs) -> Tensor:
    """Mark the tokens whose ratio the mini-batch's bounds clip, without the dual clip; [B, T] bool."""
    if mini.bounds is None:
        return torch.zeros_like(mini.batch.action_mask)
    ratio = require_tensor(outputs.ratio, "ratio").detach()
    return functional.clipped(ratio, mini.advantages, mini.bounds.lower, mini.bounds.upper)


@requires("old_logprobs")
def mismatch_metrics(rollout: MiniBatch, context: Context) -> Mapping[str, float]:
    """Measure the mismatch of learner (before the update) and sampling policy over the action tokens.

    Returns:
        mismatch/mean and mismatch/max of |old logprob - rollout logprob| in nats, and mismatch/kl, the k3
        estimate of KL(rollout || old).
    """
    batch = rollout.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")[batch.action_mask]
    drawn = batch.logprobs[batch.action_mask]
    if not len(old):
        return {}
    gap = (old - drawn).abs()
    return {
        "mismatch/mean": float(gap.mean()),
        "mismatch/max": float(gap.max()),
        "mismatch/kl": float(functional.kl_k3(drawn, old).mean()),
    }


@dataclass(frozen=True)
class Algorithm:
    """One function, or one tuple of functions, per slot.

    Args:
        select: Chooses the groups to learn from. (groups, context) -> groups
        rollout: What the algorithm asks of the rollout.
        shape_reward: Reward shapers: (episode, context) -> reward per turn. Each sees the episode as the
            previous one left it.
        shape_group: Reward shapers that compare the episodes of a group: (group, context) -> rewards per
            episode and turn. They run after `shape_reward`, each on what the previous one left. They see the
            finished episodes only, so an aborted one can neither change a reward nor get one.
        reward_model: A language model that is trained beside the policy, for components that require
            `reward_model`.
        advantage: Advantages over the whole rollout batch. (batch, context) -> [B, T]
        targets: Regression targets of the value function, stored in `Batch.targets`. (batch, context) -> [B,
            T]
        transforms: Functions that change the advantages. (advantages, batch, context) -> [B, T]
        masks: Tokens that stay in the surrogate. A mask CHANGES its normaliser. (mini-batch, context) -> [B,
            T] bool
        weights: Factors of the surrogate. A weight does NOT change its normaliser. (mini-batch, context) ->
            [B, T]
        ratio: Ratio of new to old probability, with gradient. (outputs, mini-batch) -> [B, T]
        clip: Bounds of the ratio. (mini-batch, context) -> Bounds; None if `surrogate` uses no ratio.
        surrogate: The policy loss. (outputs, mini-batch, bounds) -> [B, T]
        aggregation: (mask, turns, trajectory) -> weights [B, T] and the count that divides their sum.
        terms: Losses beside the surrogate.
        group_terms: Losses that couple the trajectories of a group. With them, a mini-batch holds whole
            groups. They do not act on replayed rows, which have lost their groups.
        view: A second view of the observations, scored for components that require `observation_kl`.
        replay: Memory of earlier experience.
        stateful: Components with a memory or parameters of their own, see `Stateful`. Those that other slots
            show need not be listed: a hook, the owner of a method, an argument of `functools.partial`.
        diagnostics: Metrics to log, by name. (rollout batch with advantages, context) -> mapping
    """

    select: Select = drop_equal_returns
    rollout: RolloutPlan = field(default_factory=RolloutPlan)
    shape_reward: tuple[ShapeReward, ...] = ()
    shape_group: tuple[ShapeGroup, ...] = ()
    reward_model: RewardModel | None = None
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
    group_terms: tuple[GroupTerm, ...] = ()
    view: ObservationView | None = None
    replay: Replay | None = None
    stateful: tuple[Stateful, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = (mismatch_metrics,)

    def __post_init__(self) -> None:
        contradictions = [
            f"{slot} cannot be combined with {other_slot}: {why} ({_name(component)}, {_name(other)})"
            for slot, component in self._functions()
            for name, why in dict(declarations(component, EXCLUDES)).items()
            for other_slot, other in self._functions()
            if other is not component and name in declarations(other, TRAITS)
        ]
        if contradictions:
            raise ConfigError("; ".join(contradictions))
        for component in self.stateful:
            if not is_stateful(component):
                raise ConfigError(
                    f"stateful: {_name(component)} lacks one of `update`, `state_dict` and `load_state_dict`"
                )
        self.find_stateful()

    @property
    def requires(self) -> frozenset[str]:
        """Return the union of the requirements of all components."""
        return frozenset().union(*(names for _, names in self.declared()))

    def requires_of(self, *slots: str) -> frozenset[str]:
        """Return the union of the requirements of the given slots."""
        return frozenset().union(
            *(names for slot, names in self.declared() if slot.partition("/")[0] in slots)
        )

    @property
    def compares(self) -> bool:
        """Return whether the algorithm learns from differences between the episodes of a group."""
        return COMPARES in traits(self.select) | traits(self.advantage)

    @property
    def scheduled(self) -> bool:
        """Return whether a component declared that it depends on the number of steps of the run."""
        coefficients = (
            getattr(component, name, None)
            for _, component in self.components()
            if isinstance(component, Term | GroupTerm)
            for name in ("coefficient", "target")
        )
        functions = (function for _, function in self._functions())
        return any(SCHEDULED in traits(each) for each in (*functions, *coefficients))

    @property
    def reads_scores(self) -> bool:
        """Return whether a component of the update reads the scoring pass, apart from the ratio."""
        # Without that pass, diagnostics see what the step scored on the way, which holds no statistics.
        required = self.requires
        return (
            reads_statistics(required)
            or features_read_scores(required)
            or any(names & SCORED for slot, names in self.declared() if slot not in AFTER_UPDATE)
        )

    def find_stateful(self, *slots: str) -> dict[str, Stateful]:
        """Return the stateful components of the given slots, or of all of them, by name."""
        return find_stateful(component for slot, component in self.components() if not slots or slot in slots)

    def components(self) -> Iterable[tuple[str, object]]:
        """Yield every filled slot as (slot, function or record)."""
        for item in fields(self):
            value = getattr(self, item.name)
            for component in value if isinstance(value, tuple) else (value,):
                if component is not None:
                    yield item.name, component

    def declared(self) -> Iterable[tuple[str, frozenset[str]]]:
        """Yield the requirements of each component as (slot, names), with those of required features."""
        for slot, component in self.components():
            name = f"{slot}/{component.name}" if isinstance(component, Term | GroupTerm) else slot
            names = frozenset[str]().union(*map(requirements, _parts(component)))
            # Slopes of what is not a sum over tokens are those at the current policy.
            sloped = isinstance(component, GroupTerm) or getattr(component, "target", None) is not None
            names |= {"current"} if sloped else {"reward_model"} & {slot}
            yield name, with_sources(names)
        for stateful in self.find_stateful().values():
            yield "stateful", with_sources(requirements(stateful.update))

    def _functions(self) -> Iterable[tuple[str, object]]:
        """Yield every function as (slot, function), also those of records."""
        for slot, component in self.components():
            for function in _parts(component):
                yield slot, function


def _parts(component: object) -> tuple[object, ...]:
    """Return the functions of a record in a slot, or the function in the slot itself."""
    if isinstance(component, Term):
        return component.loss, component.where, component.aggregation
    if isinstance(component, GroupTerm | RewardModel):
        return (component.loss,)
    if isinstance(component, ObservationView):
        return (component.share,)
    if isinstance(component, RolloutPlan):
        return (
            component.branch_policy,
            component.reply_temperature,
            component.turn_gate,
            component.end_thoughts,
        )
    return (component,)


def _name(function: object) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def check_requirements(algorithm: Algorithm, provided: Iterable[str]) -> None:
    """Refuse, before the first rollout, an algorithm with a requirement that the run does not meet.

    Raises:
        RequirementError: Names every slot and what it lacks.
    """
    offered = frozenset(provided)
    missing = [
        f"{slot} requires {', '.join(map(_explained, lacking))}"
        for slot, names in algorithm.declared()
        if (lacking := sorted(name for name in names - offered if not _is_computed(name, offered)))
    ]
    if missing:
        listed = ", ".join(sorted(offered - {STATISTICS})) or "nothing"
        more = f", and of each token {', '.join(statistic_usages())}" if STATISTICS in offered else ""
        raise RequirementError(f"algorithm: {'; '.join(missing)}; this run provides {listed}{more}")


def _is_computed(requirement: str, offered: frozenset[str]) -> bool:
    if is_feature(requirement):
        return feature_fault(requirement) is None
    if compares_with_teacher(requirement) and TEACHER not in offered:
        return False
    return STATISTICS in offered and is_statistic(requirement) and statistic_fault(requirement) is None


_NO_TEACHER = "learner.teacher is null, wanted the model to learn from"
_REFUSED = {
    "reward_model": "it is what `Algorithm.reward_model` trains, all of it and not with learner.lora",
    "rollout:token_temperature": "only engine.name=torch without engine.actors samples each token at a "
    "temperature of its own; the others sample a whole reply at one",
    "rollout:confidence": "only engine.name=torch without engine.actors measures it while it samples",
    "rollout:scores": "the learner scores replies during the rollout, wanted trainer.mode=sync and one "
    "learning process",
    TEACHER: _NO_TEACHER,
}


def _explained(requirement: str) -> str:
    if requirement in _REFUSED:
        return f"{requirement} ({_REFUSED[requirement]})"
    fault = None
    if compares_with_teacher(requirement):
        fault = statistic_fault(requirement) or _NO_TEACHER
    elif requirement not in SCORED:
        fault = (not is_statistic(requirement) and feature_fault(requirement)) or statistic_fault(requirement)
    return requirement if fault is None else f"{requirement} ({fault})"


_RENAMED = {"Rehearsal": "ReplayBatch", "held_back": "clipped_tokens", "given": "require_tensor"}


def __getattr__(name: str) -> Any:
    """Return a name that has moved or was renamed, for packages that still import it from here."""
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"agentrl.algorithms.algorithm.{name} is now {new}", DeprecationWarning, stacklevel=2)
        return globals()[new]
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
