"""SAPO: a smooth gate in place of the clip, which closes faster where the advantage is negative."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import build_plain
from agentrl.algorithms.hooks import Bounds, MiniBatch, Outputs, excludes, require_tensor
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe

Sharpness = Annotated[float, Interval(ge=1e-6, le=1e3)]


@recipe("sapo")
@dataclass(frozen=True)
class SAPO(Recipe):
    """Soft adaptive policy optimisation: the gradient of a token fades as its ratio leaves 1.

        loss = mean of -A (4 / tau) sigmoid(tau (ratio - 1)),   tau = tau_positive if A > 0, else tau_negative

    The gradient is that of an unclipped ratio times 4 q (1 - q), where q is the sigmoid: 1 at a ratio of 1,
    and the smaller the farther from it. As tau goes to 0 it is its base without a clip.

        field               | paper    | released | ours
        base.name           | grpo     | grpo     | grpo
        base.preset         | paper    | released | ours
        base.aggregation    | sequence | sequence | sequence
        base.kl_coefficient | 0.0      | 0.0      | 0.0

    The loss is the mean over the tokens of a sequence, then over sequences. `released` is SkyRL; ARL-Arena
    chooses tau by the mean advantage of a row, which differs only if the advantage changes its sign within
    one. A base with a clip is needed, whose bounds are then not used.

    Args:
        base: The recipe that provides the advantage, selection, rewards and terms.
        tau_positive: How fast the gate closes where the advantage is positive.
        tau_negative: How fast it closes elsewhere.

    Source: Gao et al. 2025, arXiv:2511.20347.
    """

    KIND = "clipping"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}},
        "released": {"base": {"name": "grpo", "preset": "released", "aggregation": "sequence"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    tau_positive: Sharpness = 1.0
    tau_negative: Sharpness = 1.05

    def build(self) -> Algorithm:
        """Build the base with the gate in place of its clip."""
        gate = partial(gated_ratio, positive=self.tau_positive, negative=self.tau_negative)
        return replace(build_plain(self.base, self.name), clip=None, surrogate=gate)


@excludes(sequence_ratio="its gate is that of a single token")
def gated_ratio(
    outputs: Outputs, mini: MiniBatch, bounds: Bounds | None, *, positive: float, negative: float
) -> Tensor:
    """Return the loss of the gated ratio; [B, T]."""
    ratio = require_tensor(outputs.ratio, "ratio")
    tau = torch.full_like(ratio.detach(), negative).masked_fill(mini.advantages > 0, positive)
    return -mini.advantages * 4 / tau * (tau * (ratio - 1)).sigmoid()
