"""AEPO: entropy decides where rollouts branch, how tokens are credited, and which gradients are kept."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, clipped_policy_loss
from agentrl.algorithms.branching import opening_entropy
from agentrl.algorithms.features import branch_weights
from agentrl.algorithms.hooks import (
    Bounds,
    Context,
    Diagnostic,
    MiniBatch,
    Outputs,
    Transform,
    excludes,
    require_tensor,
    requires,
    trait,
)
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Count, Share, SignedWeight, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Episode, Turn
from agentrl.errors import ConfigError
from agentrl.seeds import derive_seed

Limits = tuple[SignedWeight, SignedWeight]


@recipe("aepo")
@dataclass(frozen=True)
class AEPO(Recipe):
    """Agentic entropy-balanced policy optimisation: branching, credit and clipping that depend on entropy.

        advantage = A * clip(1 + entropy_advantage * (H - mean H) / std H, advantage_limits)
        P         = clip((offset + entropy_weight * dH) * max(0, 1 - branch_penalty * streak), 0, 1)

    This is the AEPO of arXiv 2510.14545. Other methods have the same short name: arbitrary entropy policy
    optimisation (arXiv 2510.08141) and the adaptive one of ARES.

    The first rollout of a task is played alone. The entropies of its first turn and of the later ones decide
    how many more rollouts start at the first observation; the rest of the group size is reserved for
    branches. A branch starts in the state that the environment has just reached, if the last turn was less
    certain than the first turn of its path. The more replies in a row have branched on a path, the less
    likely the next branch. When all episodes have ended, the remaining ones start at the first observation,
    all at once, and have no branches of their own. A turn's entropy is the mean over its first 20 action
    tokens, in units of the logarithm of the vocabulary. A turn without action tokens starts no branch.

    The preset `released` follows the released code, as far as possible without lock-step rollouts:
    - the released scripts do not use the measured split: half of the group starts at the first observation
      (`initial_rollouts: measured` uses the split);
    - the measured split is rounded down and 1 is added, and the first turn counts among the later ones;
    - a turn's entropy is the sum, not the mean, over its first action tokens (with exact entropies, while the
      released code adds up the ten most likely tokens);
    - a branch is compared with its own first turn, not with its path's;
    - replies in a row are counted over all paths of the task;
    - the entropy advantage is off: the released scripts never compute the entropies that it needs.

        field             | paper     | released   | ours
        base.name         | grpo      | grpo       | grpo
        base.preset       | ours      | released   | ours
        base.dual_clip    | 3.0       | 3.0        | null
        base.aggregation  | token     | token      | sequence
        entropy_advantage | 0.2       | 0.0        | 0.2
        advantage_limits  | null      | null       | [0.0, 2.0]
        initial_rollouts  | measured  | half       | measured
        allocation_slope  | 4.0       | 0.5        | 4.0
        branch_rule       | threshold | stochastic | stochastic

    The paper's slope, offset, weight and threshold of branching are not known to us; the values are ours. The
    released scripts ran groups of 16, 8 of them starting at the first observation.

    Args:
        base: The recipe that is modified.
        entropy_advantage: The change of an advantage's factor per standard deviation of the token's entropy,
            over the rollout batch; 0 leaves advantages unchanged.
        advantage_limits: The limits of that factor; null lets advantages change their sign.
        stop_gradient_clip: Whether ratios above the upper bound keep a gradient, of the bound's size.
        branch: Whether rollouts branch.
        initial_rollouts: The number of rollouts that start at the first observation: a number, `measured` by
            the first of them, or `half` of the group; null takes the value of the preset.
        allocation_slope: The slope of the measured split (0.5 in the released code, which has almost no
            effect).
        branch_rule: `stochastic` draws the offset in [0, 1) for every attempt, `threshold` takes
            `branch_offset`.
        branch_probability: The score that must be reached (`stochastic`) or exceeded (`threshold`).
        branch_offset: The offset of `threshold`.
        entropy_weight: The weight of the turn's entropy above the first turn's.
        branch_penalty: The share subtracted for every reply in a row that has branched.
        beam: The maximum number of paths after a reply, including the original one; use `branch: false` for
            no branches.
        prefix_weight: The weight of turns that branches share: `full` trains them once per branch with the
            advantage of each, as released; `shared` divides the weight by the number of branches.
        parity: `official` follows the preset `released` in what no field describes; of the table it sets
            entropy_advantage (and refuses other values) and, unless given, initial_rollouts. `paper` has no
            effect.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {
            "base": {"name": "grpo", "aggregation": "token", "dual_clip": 3.0},
            "advantage_limits": None,
            "branch_rule": "threshold",
        },
        "released": {
            "base": {"name": "grpo", "preset": "released"},
            "entropy_advantage": 0.0,
            "advantage_limits": None,
            "initial_rollouts": "half",
            "allocation_slope": 0.5,
        },
    }
    OFFICIAL: ClassVar[Collection[str]] = ("entropy_advantage",)
    OPEN: ClassVar[Collection[str]] = ("initial_rollouts",)

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    entropy_advantage: Weight = 0.2
    advantage_limits: Limits | None = (0.0, 2.0)
    stop_gradient_clip: bool = True
    branch: bool = True
    initial_rollouts: Count | Literal["measured", "half"] = "measured"
    allocation_slope: Weight = 4.0
    branch_rule: Literal["stochastic", "threshold"] = "stochastic"
    branch_probability: Share = 0.5
    branch_offset: SignedWeight = 0.5
    entropy_weight: SignedWeight = 0.2
    branch_penalty: Share = 0.05
    beam: Annotated[int, Interval(ge=2, le=1000)] = 2
    prefix_weight: Literal["full", "shared"] = "full"
    parity: Literal["paper", "official"] = "paper"

    def build(self) -> Algorithm:
        """Build the base with the changes of AEPO."""
        base = self.base.build()
        if self.stop_gradient_clip and base.surrogate is not clipped_policy_loss:
            raise ConfigError(
                f"stop_gradient_clip is true, but base {self.base.name} does not have the clipped loss"
            )
        if self.branch and base.rollout.branch_policy is not None:
            raise ConfigError(f"branch is true, but base {self.base.name} decides where episodes start")
        branch_policy = partial(EntropyBranching, self) if self.branch else base.rollout.branch_policy
        return replace(
            base,
            rollout=replace(base.rollout, branch_policy=branch_policy),
            transforms=(*base.transforms, *self._transforms()),
            weights=(*base.weights, shared_turn_weight) if self.prefix_weight == "shared" else base.weights,
            surrogate=stop_gradient_policy_loss if self.stop_gradient_clip else base.surrogate,
            diagnostics=(*base.diagnostics, *self._diagnostics()),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        limits = self.advantage_limits
        return [
            *super()._contradictions(),
            (
                limits is not None and not limits[0] <= 1 <= limits[1],
                f"advantage_limits is {limits}, wanted a range that contains 1, the factor at mean entropy",
            ),
        ]

    def _transforms(self) -> Sequence[Transform]:
        if not self.entropy_advantage:
            return ()
        return (partial(scale_by_entropy, scale=self.entropy_advantage, limits=self.advantage_limits),)

    def _diagnostics(self) -> Sequence[Diagnostic]:
        if not self.entropy_advantage:
            return ()
        return (partial(entropy_factors, scale=self.entropy_advantage, limits=self.advantage_limits),)


@requires("rollout:entropy")
@dataclass
class EntropyBranching:
    """Rollouts of one task that branch by entropy, as `AEPO` describes; a `BranchPolicy`.

    Args:
        settings: The recipe.
        budget: The number of episodes of the task.
        seed: The seed of the draws, each of which also depends on the episode, the turn and the attempt.
        context: Provides the size of the vocabulary; if it is unknown, entropies stay in nats.
    """

    settings: AEPO
    budget: int
    seed: int
    context: Context
    _measuring: bool = field(default=False, init=False)
    _streaks: dict[tuple[str, int], int] = field(default_factory=dict, init=False)  # by path and turns so far
    _task_streak: int = field(default=0, init=False)

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start the first rollouts."""
        initial = self.settings.initial_rollouts
        self._measuring = initial == "measured"
        if initial == "measured":
            return [None]
        return [None] * (max(self.budget // 2, 1) if initial == "half" else min(initial, self.budget))

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start a branch for each attempt that succeeds at the current state."""
        entropy = self._entropy(turns[-1])
        if self._measuring or entropy is None:
            return ()
        known = turns[parent.turn :] if parent is not None and self._official else turns
        change = entropy - next(value for turn in known if (value := self._entropy(turn)) is not None)
        streak = self._streak(episode, parent, len(turns) - 1)
        attempts = range(self.settings.beam - 1)
        fired = sum(self._fires(change, streak, episode, len(turns), attempt) for attempt in attempts)
        self._streaks[episode, len(turns)] = self._task_streak = streak + 1 if fired else 0
        return [BranchPoint(episode, len(turns))] * fired

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start the other initial rollouts when the measured one has ended."""
        if not self._measuring:
            return ()
        self._measuring = False
        root, tool = self._profile(episode.turns)
        count = initial_rollouts(
            self.budget, root, tool, slope=self.settings.allocation_slope, round_up=self._official
        )
        return [None] * (count - 1)

    @property
    def _official(self) -> bool:
        return self.settings.preset == "released"

    def _entropy(self, turn: Turn) -> float | None:
        return opening_entropy(turn, self.context.vocabulary, total=self._official)

    def _profile(self, turns: Sequence[Turn]) -> tuple[float, float]:
        """Return the entropy of the first turn and of the later ones; equal if one is unknown."""
        found = [self._entropy(turn) for turn in turns]
        root = found[0] if found else None
        later = [value for value in found[0 if self._official else 1 :] if value is not None]
        if root is None or not later:
            return 0.0, 0.0
        return root, sum(later) / len(later)

    def _streak(self, episode: str, parent: BranchPoint | None, before: int) -> int:
        """Count the replies in a row, up to the last but one, at which the path or its parent branched."""
        if self._official:
            return self._task_streak
        if parent is not None and parent.turn == before:
            return self._streaks.get((parent.parent, before), 0)
        return self._streaks.get((episode, before), 0)

    def _fires(self, change: float, streak: int, episode: str, turns: int, attempt: int) -> bool:
        settings = self.settings
        stochastic = settings.branch_rule == "stochastic"
        drawn = derive_seed(self.seed, "branch", episode, turns, attempt) / 2**31
        score = branch_score(
            change,
            streak,
            offset=drawn if stochastic else settings.branch_offset,
            weight=settings.entropy_weight,
            penalty=settings.branch_penalty,
        )
        wanted = settings.branch_probability
        return score >= wanted if stochastic else score > wanted


def initial_rollouts(budget: int, root: float, tool: float, *, slope: float, round_up: bool = False) -> int:
    """Return how many rollouts of a task start at the first observation; the others can branch.

        m = clamp( floor( k * sigmoid(slope * (H_root - H_tool)) + 1/2 ), 1, k )

    Args:
        budget: k, the number of rollouts of the task.
        root: H_root, entropy of the first turn, over the logarithm of the vocabulary.
        tool: H_tool, entropy of the turns that answer the environment, over the logarithm of the vocabulary.
        slope: The slope of the sigmoid.
        round_up: Whether to add 1 instead of 1/2, as the released code does.

    Source: Dong et al. 2025, arXiv:2510.14545.
    """
    share = 0.5 * (1 + math.tanh(0.5 * slope * (root - tool)))  # the sigmoid, without its overflow
    return min(max(math.floor(budget * share + (1.0 if round_up else 0.5)), 1), budget)


def branch_score(change: float, streak: int, *, offset: float, weight: float, penalty: float) -> float:
    """Return the score that decides whether to branch.

        P = clamp( (offset + weight * change) * max(0, 1 - penalty * streak), 0, 1 )

    Args:
        change: The change of entropy since the first turn of the path, over the logarithm of the vocabulary.
        streak: The number of replies in a row at which the path has branched.
        offset: A constant (the paper) or a fresh uniform draw (the released code).
        weight: The weight of the change.
        penalty: The penalty per reply of the streak.

    Source: Dong et al. 2025, arXiv:2510.14545.
    """
    return min(max((offset + weight * change) * max(0.0, 1 - penalty * streak), 0.0), 1.0)


@requires("entropy")
@trait("token entropy advantage")
def scale_by_entropy(
    advantages: Tensor, batch: Batch, context: Context, *, scale: float, limits: Limits | None
) -> Tensor:
    """Scale advantages by the token's standardised entropy in the rollout batch; [B, T].

    See `entropy_scaled_advantage`.
    """
    entropies = require_tensor(batch.old_entropies, "old_entropies")
    return functional.entropy_scaled_advantage(
        advantages, entropies, batch.action_mask, scale=scale, limits=limits
    )


@excludes(sequence_ratio="it bounds the ratio of single tokens, not of a sequence")
def stop_gradient_policy_loss(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Return the value of the clipped surrogate, with a gradient above the upper bound; [B, T]."""
    if bounds is None:
        return clipped_policy_loss(outputs, mini, None)
    return functional.stop_gradient_clipped_surrogate(
        require_tensor(outputs.ratio, "ratio"), mini.advantages, bounds.lower, bounds.upper, bounds.dual
    )


def shared_turn_weight(mini: MiniBatch, context: Context) -> Tensor:
    """Return one over the number of trajectories of the rollout batch that share a turn; [B, T]."""
    batch = mini.batch
    return functional.broadcast_turns_to_tokens(
        branch_weights(batch), batch.turns, batch.trajectory, batch.action_mask
    )


@requires("entropy")
def entropy_factors(
    mini: MiniBatch, context: Context, *, scale: float, limits: Limits | None
) -> Mapping[str, float]:
    """Measure the range of standardised entropies, and the advantages that changed sign or met a limit."""
    batch = mini.batch
    entropies = require_tensor(batch.old_entropies, "old_entropies")
    if not bool(batch.action_mask.any()):
        return {}
    ones = torch.ones_like(entropies)
    factor = functional.entropy_scaled_advantage(ones, entropies, batch.action_mask, scale=scale, limits=None)
    factor = factor[batch.action_mask]
    low, high = limits or (-math.inf, math.inf)
    flipped = (factor.clamp(low, high) < 0) & (mini.advantages[batch.action_mask] != 0)
    return {
        "entropy_score_min": float(factor.min() - 1) / scale,
        "entropy_score_max": float(factor.max() - 1) / scale,
        "advantage_factor_limited": float(((factor < low) | (factor > high)).double().mean()),
        "advantages_flipped": float(flipped.sum()),
    }
