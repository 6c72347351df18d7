"""AEM: certain turns get more of the credit and of the blame, by the entropy of the turn alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import has_decision, turns_to_tokens
from agentrl.algorithms.hooks import Context, MiniBatch, excludes, requires, trait
from agentrl.algorithms.methods.empg import TURN_MODULATION
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Recipe, build_recipe, recipe
from agentrl.config import Weight
from agentrl.data.batch import Batch


@recipe("aem")
@dataclass(frozen=True)
class AEM(Recipe):
    """Adaptive entropy modulation: a turn's advantage is scaled by how certain the turn was.

        N = (H - min H) / (max H - min H),   w = exp(-k N) / mean exp(-k N),   A' = w A

    H is the mean entropy of a turn's action tokens before the update. Minimum, maximum and mean are over the
    turns of the `scope`, whose factors have the mean 1 so; where all turns are equally certain, they are 1.
    Both signs are scaled, so that this is no entropy bonus. It is the gate of `empg`, without its bonus and
    its centring. Turns that branches share count once. With k 0 it is its base.

        field | paper | released | ours
        k     | 1.0   | 1.0      | 1.0
        scope | group | group    | group

    This is a reconstruction from what others wrote: no code was found, and the paper's k and scope ("all
    responses in a rollout") are not known to us. So the presets are all ours.

    Args:
        base: The recipe whose advantage is scaled; it must be one number per turn.
        k: How much more a certain turn counts; 0 weighs all turns equally.
        scope: The turns that are compared: those of a `trajectory`, of a `group`, or of the `batch`.

    Source: arXiv:2605.00425.
    """

    KIND = "credit"
    CONFIDENCE = "reconstruction"

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    k: Weight = 1.0
    scope: Literal["trajectory", "group", "batch"] = "group"

    def build(self) -> Algorithm:
        """Build the base with scaled advantages."""
        base = self.base.build()
        return replace(
            base,
            transforms=(*base.transforms, self.scale),
            diagnostics=(*base.diagnostics, self.scale_metrics),
        )

    @requires("turn_entropy", "branch_weights")
    @trait(TURN_MODULATION)
    @excludes(
        advantage_within_a_turn="AEM scales whole turns, so the advantage of a turn must be one number",
        token_entropy_advantage="one gives more credit to certain turns, the other to uncertain tokens",
    )
    def scale(self, advantages: Tensor, batch: Batch, context: Context) -> Tensor:
        """Multiply the advantages by the factor of their turn; [B, T] float64."""
        return advantages.double() * turns_to_tokens(self.factors(batch), batch)

    @requires("turn_entropy", "branch_weights")
    def scale_metrics(self, mini: MiniBatch, context: Context) -> Mapping[str, float]:
        """Measure the smallest and the largest factor: aem/scale_min and aem/scale_max."""
        found = self.factors(mini.batch)[has_decision(mini.batch)]
        return (
            {"aem/scale_min": float(found.min()), "aem/scale_max": float(found.max())} if len(found) else {}
        )

    def factors(self, batch: Batch) -> Tensor:
        """Return the factor of every turn, 1 for turns without an action token; [E, K] float64."""
        episodes = torch.arange(len(batch.episodes), device=batch.groups.device)
        owner = {"trajectory": episodes, "group": batch.groups, "batch": torch.zeros_like(episodes)}[
            self.scope
        ]
        return turn_factors(
            feature_of(batch, "turn_entropy"),
            has_decision(batch),
            feature_of(batch, "branch_weights"),
            owner,
            k=self.k,
        )


def turn_factors(entropies: Tensor, present: Tensor, weights: Tensor, owner: Tensor, *, k: float) -> Tensor:
    """Return `functional.entropy_modulation` over the turns of each owner, 1 where not present; [E, K].

    Args:
        entropies: [E, K] float64, nats.
        present: [E, K] bool.
        weights: [E, K] float64, of each turn in the mean.
        owner: [E] int64, equal for trajectories whose turns are compared.
        k: As in `AEM`.
    """
    factors = torch.ones_like(entropies)
    for number in owner.unique().tolist():  # type: ignore[no-untyped-call]
        rows = owner == number
        scaled, _ = functional.entropy_modulation(
            entropies[rows], present[rows], k=k, k_future=0.0, weights=weights[rows]
        )
        factors[rows] = torch.where(present[rows], scaled, 1.0)
    return factors
