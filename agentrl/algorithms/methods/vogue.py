"""VOGUE for text: bonuses where replies depend on details of the observation, and where they are open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.functional.aggregation import sequence_members
from agentrl.algorithms.hooks import (
    SCHEDULED,
    Context,
    MiniBatch,
    require_tensor,
    requires,
    token_statistic,
    trait,
)
from agentrl.algorithms.observation_view import OBSERVATION_KL, ObservationView, Perturbation
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, PositiveWeight, Steps, Weight
from agentrl.data.batch import Batch

Unit = Literal["token", "turn", "trajectory"]


@recipe("vogue")
@dataclass(frozen=True)
class VOGUE(Recipe):
    """Exploration guided by two uncertainties: of the reply, and of the reply under a changed observation.

        A += min(|A| / output_bound, output_weight * u_out) + min(|A| / input_bound, input_weight * u_in)
        u_out = H(p),   u_in = (KL(p || q) + KL(q || p)) / 2
        p = pi(. | history),   q = pi(. | history with changed observations),   at the same reply tokens

    Both are of the policy before the update, and their gradient is stopped. With bounds of 2 the bonuses can
    at most cancel a negative advantage. An episode is scored with changed observations with probability share
    max(0, 1 - step / fade_steps); in the others u_in is 0. That is one further pass without gradient; no
    further episode is played. The task, the admissible actions and the replies are never changed.

        field         | paper | released | ours
        base.name     | grpo  | grpo     | grpo
        base.preset   | paper | released | ours
        input_weight  | 1.0   | 0.1      | 1.0
        output_weight | 0.4   | 0.0      | 0.4
        divergence    | full  | taken    | full
        amount        | 0.4   | 0.4      | 0.1

    The paper changes images, and learns from two groups of episodes, with and without the change. Ours
    changes text, and gives the bonus of the change to the episodes without it. Its image noise has a std of
    0.4; noise on embeddings is the nearest to it. The released code takes the divergence of the sampled token
    alone; the sign that it turns during training, as an option, is left out. With weights of 0 it is its
    base.

    Args:
        base: The recipe whose advantages get the bonuses.
        perturbation: How observations are changed, see `ObservationView`.
        amount: The std of `noise` in units of an embedding's root mean square, or the probability of a token
            or item to be left out.
        input_weight: The weight of u_in, per nat.
        input_bound: The part of |A| that bounds its bonus is one over this.
        output_weight: The weight of u_out, per nat.
        output_bound: The part of |A| that bounds its bonus is one over this.
        divergence: `full` over the vocabulary or the allowed ids, or `taken`, see `taken_divergence`.
        unit: u_in is that of each token, or its mean over the action tokens of a turn or a trajectory.
        share: The share of the episodes that are scored twice in the first step.
        fade_steps: The step from which on none is; null for the steps of the run.

    Source: arXiv:2510.01444.
    """

    KIND = "exploration"
    CONFIDENCE = "paper read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper"}, "amount": 0.4},
        "released": {"base": {"name": "grpo", "preset": "released"}, "amount": 0.4}
        | {"input_weight": 0.1, "output_weight": 0.0, "divergence": "taken"},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    perturbation: Perturbation = "noise"
    amount: Annotated[float, Interval(gt=0, le=100)] = 0.1
    input_weight: Weight = 1.0
    input_bound: PositiveWeight = 2.0
    output_weight: Weight = 0.4
    output_bound: PositiveWeight = 2.0
    divergence: Literal["full", "taken"] = "full"
    unit: Unit = "token"
    share: PositiveShare = 1.0
    fade_steps: Annotated[Steps, Interval(ge=1)] | None = None

    def build(self) -> Algorithm:
        """Build the base with the bonuses, and the view that they need."""
        base = self.base.build()
        if not self.input_weight and not self.output_weight:
            return base
        view, needs = base.view, ["entropy"]
        if self.input_weight:
            # Without a number of its own, the fade follows the length of the run.
            fade = self.probability if self.fade_steps else trait(SCHEDULED)(self.probability)
            view = ObservationView(self.perturbation, self.amount, fade, taken=self.divergence == "taken")
            needs.append(OBSERVATION_KL)
        guide = requires(*needs)(self.guide)
        return replace(
            base,
            view=view,
            transforms=(*base.transforms, trait("advantage within a turn")(guide)),
            diagnostics=(*base.diagnostics, requires(*needs)(self.metrics)),
        )

    def probability(self, context: Context) -> float:
        """Return the probability of an episode to be scored with changed observations."""
        steps = self.fade_steps or context.total_steps
        return self.share * max(0.0, 1 - context.step / max(1, steps))

    def uncertainties(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return u_in and u_out of each action token; [B, T] float64 in nats, 0 elsewhere."""
        out = require_tensor(batch.old_entropies, "old_entropies").double()
        if not self.input_weight:
            return torch.zeros_like(out), out
        found = token_statistic(batch, OBSERVATION_KL).double()
        if self.unit == "token":
            return found, out
        mask = batch.action_mask
        member, count = sequence_members(mask, batch.turns, batch.trajectory, self.unit)
        sums, sizes = (
            found.new_zeros(count).index_add(0, member.flatten(), each.flatten())
            for each in (torch.where(mask, found, 0.0), mask.double())
        )
        return torch.where(mask, (sums / sizes.clamp(min=1))[member], 0.0), out

    def guide(self, advantages: Tensor, batch: Batch, context: Context) -> Tensor:
        """Add both bonuses; [B, T] float64."""
        advantages = advantages.double()
        inside, out = self.uncertainties(batch)
        return (
            advantages
            + functional.bounded_bonus(advantages, out, self.output_weight, self.output_bound)
            + functional.bounded_bonus(advantages, inside, self.input_weight, self.input_bound)
        )

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the mean uncertainties of the action tokens, and the share of them with a divergence."""
        mask = rollout.batch.action_mask
        if not bool(mask.any()):
            return {}
        inside, out = (values[mask] for values in self.uncertainties(rollout.batch))
        return {
            "vogue/input_divergence": float(inside.mean()),
            "vogue/output_entropy": float(out.mean()),
            "vogue/changed_share": float((inside != 0).double().mean()),
        }

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        wrong = self.perturbation in ("tokens", "items") and self.amount > 1
        told = f"amount is {self.amount}, wanted at most 1 with perturbation={self.perturbation}"
        return [(wrong, told)]
