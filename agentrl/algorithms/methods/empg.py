"""EMPG: advantages modulated by the certainty of the policy in a turn, and in the next turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.features import turns_to_tokens
from agentrl.algorithms.hooks import TOKEN_TRANSFORM, Context, MiniBatch, excludes, requires, traits
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Recipe, build_recipe, recipe
from agentrl.config import Weight
from agentrl.data.batch import Batch
from agentrl.errors import ConfigError

TURN_MODULATION = "turn modulation"  # a trait: a turn's advantage is scaled by its certainty


@recipe("empg")
@dataclass(frozen=True)
class EMPG(Recipe):
    """Entropy-modulated policy gradients: certain turns get more of the credit, and of the blame.

        N = (H - min H) / (max H - min H),   g = exp(-k N) / mean exp(-k N),   f = exp(-k_future N)
        A'[i, t] = A[i, t] g[i, t] + zeta f[i, next turn],   advantage = A' - mean A'

    H is the mean entropy of a turn's action tokens before the update. Turns without action tokens are
    skipped. The last turn has no bonus, so that in one-turn episodes only g acts. Minimum, maximum and means
    are over all turns of the rollout batch, after the selection of groups; a turn shared by several branches
    counts once in the means. Every turn counts the same here, whatever its length, while an aggregation by
    tokens gives long turns more weight.

    If every advantage of the base is 0, the rest of the bonus is still trained on: see `empg/bonus_share` in
    the log.

    The authors released no code, so there is no `parity`. There are two public re-implementations: the later
    one has zeta 0.05; the earlier one has 0.1, and multiplies the whole batch by the g of every turn in it.

        field    | paper | released | ours
        k        | 1.0   | 1.0      | 1.0
        k_future | 1.0   | 1.0      | 1.0
        zeta     | 0.05  | 0.05     | 0.05

    The paper's k and zeta per environment are not known to us. So the presets are all ours, with the values
    of the later re-implementation.

    Args:
        base: The recipe whose advantage is modulated; it must be one number per turn.
        k: How much more a certain turn counts; 0 weights all turns equally.
        k_future: How fast the bonus falls with the uncertainty of the next turn.
        zeta: The weight of the bonus, in units of the advantage.

    Source: Wang et al. 2025, arXiv:2509.09265.
    """

    KIND = "credit"
    CONFIDENCE = "reconstruction"

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    k: Weight = 1.0
    k_future: Weight = 1.0
    zeta: Weight = 0.05

    def build(self) -> Algorithm:
        """Build the base with modulated advantages."""
        base = self.base.build()
        if any(TOKEN_TRANSFORM in traits(transform) for transform in base.transforms):
            raise ConfigError(
                f"empg: its base {self.base.name!r} changes the advantages of single tokens, but EMPG scales "
                f"whole turns, wanted empg as the base of {self.base.name!r}"
            )
        return replace(
            base,
            transforms=(*base.transforms, self.modulate),
            diagnostics=(*base.diagnostics, partial(self.modulation, base=base)),
        )

    @requires("turn_entropy", "branch_weights")
    @excludes(
        advantage_within_a_turn="EMPG scales whole turns, so the advantage of a turn must be one number",
        token_entropy_advantage="one gives more credit to certain turns, the other to uncertain tokens",
        turn_modulation="it has the gate of AEM already",
    )
    def modulate(self, advantages: Tensor, batch: Batch, context: Context) -> Tensor:
        """Scale the advantages by g, add the bonus and centre them; [B, T] float64.

        Raises:
            ValueError: If the advantage differs between the action tokens of one turn.
        """
        final = self._final(_steps(advantages, batch), self.zeta)
        return turns_to_tokens(final, batch)

    @requires("turn_entropy", "branch_weights")
    def modulation(self, mini: MiniBatch, context: Context, *, base: Algorithm) -> Mapping[str, float]:
        """Measure how the base's advantages changed, by turn.

        `bonus_share` is the bonus's part of all |advantage|, `sign_flips` the share of turns whose advantage
        changed its sign.
        """
        steps = _steps(compute_advantages(base, mini.batch, context), mini.batch)
        if not bool(steps.present.any()):
            return {}
        scale, _ = functional.entropy_modulation(
            steps.entropies, steps.present, k=self.k, k_future=self.k_future, weights=steps.weights
        )
        final, scaled = self._final(steps, self.zeta), self._final(steps, 0.0)
        weight = torch.where(steps.present, steps.weights, 0.0)
        bonus = float((weight * (final - scaled).abs()).sum())
        total = bonus + float((weight * scaled.abs()).sum())
        flipped = (final * steps.advantages < 0).double()
        return {
            "empg/scale_mean": float((weight * scale).sum() / weight.sum()),
            "empg/scale_min": float(scale[steps.present].min()),
            "empg/scale_max": float(scale[steps.present].max()),
            "empg/bonus_share": bonus / total if total else 0.0,
            "empg/sign_flips": float((weight * flipped).sum() / weight.sum()),
        }

    def _final(self, steps: "_Steps", zeta: float) -> Tensor:
        return functional.entropy_modulated_advantage(
            steps.advantages,
            steps.entropies,
            steps.present,
            k=self.k,
            k_future=self.k_future,
            zeta=zeta,
            weights=steps.weights,
        )


@dataclass(frozen=True)
class _Steps:
    """Turns of a batch, [E, K] each. Turns that are not present have no action tokens."""

    advantages: Tensor  # float64
    entropies: Tensor  # float64, nats, mean over the action tokens
    present: Tensor  # bool
    weights: Tensor  # float64, one over the number of branches that share the turn


def _steps(advantages: Tensor, batch: Batch) -> _Steps:
    values = torch.where(batch.action_mask, advantages, 0.0).double()
    credit, present = functional.turn_means(
        values, batch.action_mask, batch.turns, batch.trajectory, len(batch.episodes)
    )
    if not torch.allclose(turns_to_tokens(credit, batch), values, equal_nan=True):
        raise ValueError("empg: the base's advantage differs within a turn, wanted one number for each turn")
    entropies, weights = (
        feature_of(batch, name)[:, : present.shape[1]] for name in ("turn_entropy", "branch_weights")
    )
    return _Steps(credit, entropies, present, weights)
