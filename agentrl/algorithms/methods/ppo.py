"""PPO with a value function: generalised advantage estimates and a clipped ratio."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, Term, require_tensor, requires, trait
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.algorithms.value_estimates import row_gae, trajectory_gae, turn_gae
from agentrl.config import PositiveWeight, Share, Weight
from agentrl.data.batch import Batch

Estimate = Callable[[Batch], tuple[Tensor, Tensor]]


@recipe("ppo")
@dataclass(frozen=True)
class PPO(ClippedRecipe):
    """Proximal policy optimisation: generalised advantage estimation over turns, a clipped ratio, a critic.

        delta = r + gamma_turn V(next turn) - V,   A = whiten(delta + gamma_turn lam_turn A(next turn))
        loss  = clipped surrogate of A + value_coefficient * (V - return)^2 / 2

    Advantages are normalised to mean 0 and variance 1 over the action tokens of the batch. Values and returns
    are in the reward units of the environment: `value_clip` 0.5 suits returns within [0, 1], 5.0 those within
    [0, 10]. With the preset `released`, `gae_scope` is row: every turn is an episode of its own that ends
    with the return of the whole episode, without a bootstrap.

        field               | paper      | released | ours
        dual_clip           | null       | 3.0      | null
        aggregation         | token      | token    | token
        drop_equal_groups   | false      | false    | false
        gae_scope           | trajectory | row      | trajectory
        gamma_turn          | 0.99       | 1.0      | 1.0
        bootstrap_truncated | true       | false    | false

    The paper is about control, with one action per step: its discounts are those between turns here.
    `value_clip` is not in the paper, but in its released code. The released code of the preset is verl-agent,
    with a learning rate of 1e-6.

    Args:
        gae_scope: `trajectory` estimates at every action token, with the discounts between turns only; `turn`
            treats a turn as one action, valued at its first action token, so that its tokens share one
            advantage; `row` is the return of the whole episode less the value, at every action token.
        gamma_turn: The discount from one turn to the next; unused with `row`.
        lam_turn: The GAE lambda from one turn to the next; unused with `row`.
        bootstrap_truncated: Whether truncated episodes end with their last value instead of 0; unused with
            `row`. It needs gamma_turn below 1: otherwise values can drift if all episodes reach a limit.
        value_coefficient: The coefficient of the value loss, half a square in reward units.
        value_clip: The maximum change of a value from the scoring pass, in reward units.

    The remaining fields are those of `ClippedRecipe`; two defaults differ.

    Source: Schulman et al. 2017, arXiv:1707.06347.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"gamma_turn": 0.99, "bootstrap_truncated": True},
        "released": {"gae_scope": "row"},
    }
    OFFICIAL: ClassVar[Collection[str]] = (*ClippedRecipe.OFFICIAL, "gae_scope")

    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "token"
    drop_equal_groups: bool = False
    gae_scope: Literal["trajectory", "turn", "row"] = "trajectory"
    gamma_turn: Share = 1.0
    lam_turn: Share = 0.95
    bootstrap_truncated: bool = False
    value_coefficient: Weight = 0.5
    value_clip: PositiveWeight = 0.5

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        estimate = self.estimate()
        read = ("values", "last_values") if self.bootstrap_truncated else ("values",)
        value = Term("value", partial(value_error, clip=self.value_clip), self.value_coefficient)
        return replace(
            plain,
            advantage=requires(*read)(partial(gae_advantage, estimate=estimate)),
            targets=partial(gae_returns, estimate=estimate),
            terms=(*plain.terms, value),
            diagnostics=(*plain.diagnostics, value_metrics),
        )

    def estimate(self) -> Estimate:
        """Return the estimator of `gae_scope`: batch -> unwhitened advantages and returns, [B, T] each."""
        if self.gae_scope == "row":
            return partial(row_gae, invalid_penalty=self.invalid_penalty)
        return partial(
            turn_gae if self.gae_scope == "turn" else trajectory_gae,
            gamma=self.gamma_turn,
            lam=self.lam_turn,
            bootstrap=self.bootstrap_truncated,
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.bootstrap_truncated and self.gamma_turn == 1 and self.gae_scope != "row",
                "bootstrap_truncated is true with gamma_turn 1, wanted gamma_turn below 1: otherwise nothing "
                "limits the values of truncated episodes",
            ),
        ]


@trait("advantage within a turn")
@requires("values")
def gae_advantage(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """Return the estimated advantages, whitened over all action tokens; [B, T]."""
    return functional.whiten(estimate(batch)[0], batch.action_mask)


@requires("values")
def gae_returns(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """Return the estimated return from each action token on; [B, T]."""
    return estimate(batch)[1]


@requires("values", "values:grad")
def value_error(outputs: Outputs, mini: MiniBatch, context: Context, *, clip: float) -> Tensor:
    """Return half the squared error of the values, clipped around those of the scoring pass; [B, T]."""
    batch = mini.batch
    return functional.value_loss(
        require_tensor(outputs.values, "values:grad"),
        require_tensor(batch.values, "values"),
        require_tensor(batch.targets, "targets"),
        clip,
    )


@requires("values")
def value_metrics(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """Measure the mean value, the mean return, and the share of the returns' variance that values explain."""
    batch = mini.batch
    targets = require_tensor(batch.targets, "targets")[batch.action_mask].double()
    values = require_tensor(batch.values, "values")[batch.action_mask].double()
    if not len(targets):
        return {}
    numbers = {"value_mean": float(values.mean()), "return_mean": float(targets.mean())}
    variance = float(targets.var(correction=0))
    if variance > 0:
        numbers["explained_variance"] = 1 - float((targets - values).var(correction=0)) / variance
    return numbers
