"""AEPO: entropy decides where rollouts branch, how tokens are credited, and which gradients are kept."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, clipped_policy_loss, stop_gradient_policy_loss
from agentrl.algorithms.branch_policies import BranchRule, EntropyBranching
from agentrl.algorithms.features import turns_to_tokens
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires, trait
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Count, Share, SignedWeight, Weight
from agentrl.data.batch import Batch
from agentrl.errors import ConfigError

Limits = tuple[SignedWeight, SignedWeight]


@recipe("aepo")
@dataclass(frozen=True)
class AEPO(Recipe):
    """Agentic entropy-balanced policy optimisation: branching, credit and clipping that depend on entropy.

        advantage = A * clip(1 + entropy_advantage * (H - mean H) / std H, advantage_limits)
        P         = clip((offset + entropy_weight * dH) * max(0, 1 - branch_penalty * streak), 0, 1)

    This is arXiv 2510.14545. Arbitrary entropy policy optimisation (2510.08141) is another AEPO.

    The first rollout of a task is played alone. The entropies of its first turn and of the later ones decide
    how many more rollouts start at the first observation; the rest of the group size is reserved for
    branches. A branch starts in the state that the environment has just reached, if the last turn was less
    certain than the first turn of its path. Every reply in a row that has branched makes the next branch less
    likely. When all episodes have ended, the remaining ones start at the first observation, all at once, and
    do not branch. A turn's entropy is the mean over its first 20 action tokens, in units of the logarithm of
    the vocabulary. A turn without action tokens starts no branch.

    The preset `released` follows the released code, as far as possible without lock-step rollouts:
    - the released scripts do not use the measured split, which is rounded down and increased by 1, and counts
      the first turn among the later ones (`initial_rollouts: measured` uses it);
    - a turn's entropy is the sum, not the mean (with exact entropies, while the released code adds up the ten
      most likely tokens);
    - a branch is compared with its own first turn, and replies in a row are counted over the whole task;
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
        allocation_slope: The slope of the measured split; the 0.5 of the released code has almost no effect.
        branch_rule: `stochastic` draws the offset in [0, 1) per attempt, `threshold` takes `branch_offset`.
        branch_probability: The score that must be reached (`stochastic`) or exceeded (`threshold`).
        branch_offset: The offset of `threshold`.
        entropy_weight: The weight of the turn's entropy above the first turn's.
        branch_penalty: The share subtracted for every reply in a row that has branched.
        beam: The maximum number of paths after a reply, including the original one.
        prefix_weight: The weight of turns that branches share: `full` trains them once per branch with the
            advantage of each, as released; `shared` divides the weight by the number of branches.
        parity: `official` follows the preset `released` in what no field describes; of the table it sets
            entropy_advantage and, unless given, initial_rollouts. `paper` has no effect.
    """

    KIND = "rollouts"
    CONFIDENCE = "official code read"
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
    branch_rule: BranchRule = "stochastic"
    branch_probability: Share = 0.5
    branch_offset: SignedWeight = 0.5
    entropy_weight: SignedWeight = 0.2
    branch_penalty: Share = 0.05
    beam: Annotated[int, Interval(ge=2, le=1000)] = 2
    prefix_weight: Literal["full", "shared"] = "full"
    parity: Literal["paper", "official"] = "paper"

    def build(self) -> Algorithm:
        """Build the base with the changes of AEPO."""
        built = self.base.build()
        if self.stop_gradient_clip:
            if built.surrogate is not clipped_policy_loss:
                raise ConfigError(
                    f"stop_gradient_clip is true, but base {self.base.name} does not have the clipped loss"
                )
            built = replace(built, surrogate=stop_gradient_policy_loss)
        if self.branch:
            if built.rollout.branch_policy is not None:
                raise ConfigError(f"branch is true, but base {self.base.name} decides where episodes start")
            policy = partial(
                EntropyBranching,
                initial=self.initial_rollouts,
                slope=self.allocation_slope,
                rule=self.branch_rule,
                bar=self.branch_probability,
                offset=self.branch_offset,
                weight=self.entropy_weight,
                penalty=self.branch_penalty,
                beam=self.beam,
                released=self.preset == "released",
            )
            built = replace(built, rollout=replace(built.rollout, branch_policy=policy))
        if self.entropy_advantage:
            scale, limits = self.entropy_advantage, self.advantage_limits
            built = replace(
                built,
                transforms=(*built.transforms, partial(scale_by_entropy, scale=scale, limits=limits)),
                diagnostics=(*built.diagnostics, partial(entropy_factors, scale=scale, limits=limits)),
            )
        if self.prefix_weight == "shared":
            built = replace(built, weights=(*built.weights, shared_turn_weight))
        return built

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        limits = self.advantage_limits
        wrong = limits is not None and not limits[0] <= 1 <= limits[1]
        reason = f"advantage_limits is {limits}, wanted a range that contains 1, the factor at mean entropy"
        return [*super()._contradictions(), (wrong, reason)]


@requires("entropy")
@trait("token entropy advantage")
def scale_by_entropy(
    advantages: Tensor, batch: Batch, context: Context, *, scale: float, limits: Limits | None
) -> Tensor:
    """Apply `functional.entropy_scaled_advantage` to the entropies before the update; [B, T]."""
    entropies = require_tensor(batch.old_entropies, "old_entropies")
    return functional.entropy_scaled_advantage(
        advantages, entropies, batch.action_mask, scale=scale, limits=limits
    )


@requires("branch_weights")
def shared_turn_weight(mini: MiniBatch, context: Context) -> Tensor:
    """Return one over the number of trajectories of the rollout batch that share a turn; [B, T]."""
    return turns_to_tokens(feature_of(mini, "branch_weights"), mini.batch)


@requires("entropy")
def entropy_factors(
    mini: MiniBatch, context: Context, *, scale: float, limits: Limits | None
) -> Mapping[str, float]:
    """Measure the range of standardised entropies, and the advantages that changed sign or met a limit."""
    mask = mini.batch.action_mask
    entropies = require_tensor(mini.batch.old_entropies, "old_entropies")
    if not bool(mask.any()):
        return {}
    factor = functional.entropy_factor(entropies, mask, scale=scale)[mask]
    low, high = limits or (-math.inf, math.inf)
    return {
        "entropy_score_min": float(factor.min() - 1) / scale,
        "entropy_score_max": float(factor.max() - 1) / scale,
        "advantage_factor_limited": float(((factor < low) | (factor > high)).double().mean()),
        "advantages_flipped": float(((factor.clamp(low, high) < 0) & (mini.advantages[mask] != 0)).sum()),
    }
