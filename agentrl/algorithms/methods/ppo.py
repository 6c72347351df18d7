"""PPO with a value function: what an action did beyond what was expected."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import decision_rewards, decisions, has_decision, row_scores, step_rewards
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, Term, require_tensor, requires, trait
from agentrl.algorithms.methods.grpo import ClippedRecipe
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import PositiveWeight, Share, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import StopReason

Estimate = Callable[[Batch], tuple[Tensor, Tensor]]

_CUT_OFF = {StopReason.TRUNCATED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT}


@recipe("ppo")
@dataclass(frozen=True)
class PPO(ClippedRecipe):
    """Proximal policy optimisation: generalised advantage estimation over turns, a clipped ratio, a critic.

    Advantages are made mean 0 and variance 1 over the decisions of the batch. Values and returns are in the
    reward units of the environment; `value_clip` 0.5 suits returns within [0, 1], 5.0 those within [0, 10].
    Released, `gae_scope` is row, where every turn is an episode of its own that ends in the return of the
    whole, without a bootstrap.

        field               | paper      | released | ours
        dual_clip           | null       | 3.0      | null
        aggregation         | token      | token    | token
        drop_equal_groups   | false      | false    | false
        gae_scope           | trajectory | row      | trajectory
        gamma_turn          | 0.99       | 1.0      | 1.0
        bootstrap_truncated | true       | false    | false

    The paper is about control, with an action per step: its discounts are those between turns here. It has no
    `value_clip`, which is that of its released code. Released is verl-agent, with a learning rate of 1e-6.

    Args:
        gae_scope: `trajectory` estimates at every decision, with the discounts between turns only; `turn`
            takes a turn for one action, valued at its first decision, so that its decisions share one
            advantage; `row` is the return of the whole episode less the value, at every decision.
        gamma_turn: discount from one turn to the next; not in `row`.
        lam_turn: trust in what followed a turn over the value function; not in `row`.
        bootstrap_truncated: what a limit cut off is worth its last value instead of 0; not in `row`. It needs
            gamma_turn below 1: else a policy whose episodes all reach the limit may be worth anything to
            itself, and values drift.
        value_coefficient: of the loss of the values, half a square in reward units.
        value_clip: how far a value may move from that of the scoring pass, in reward units.

    The other fields are those of `ClippedRecipe`; two defaults differ.

    Source: Schulman et al. 2017, arXiv:1707.06347.
    """

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
        """What its scope makes of a batch: advantages, not whitened, and returns, [B, T] each."""
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
                "bootstrap_truncated is true with gamma_turn 1, wanted gamma_turn below 1: nothing would "
                "hold the values of episodes that a limit ends",
            ),
        ]


@trait("advantage within a turn")
@requires("values")
def gae_advantage(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """Estimated advantages, whitened over all decisions; [B, T]."""
    return functional.whiten(estimate(batch)[0], batch.sampled)


@requires("values")
def gae_returns(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """The return from each decision on, as estimated; [B, T]."""
    return estimate(batch)[1]


def trajectory_gae(batch: Batch, *, gamma: float, lam: float, bootstrap: bool) -> tuple[Tensor, Tensor]:
    """GAE over the decisions of a trajectory, discounted between turns; advantages and returns, [B, T]."""
    made = decisions(batch)
    estimates = functional.gae(
        made.read(decision_rewards(batch)),
        made.read(require_tensor(batch.values, "values").double()),
        made.valid,
        made.turns,
        gamma_turn=gamma,
        lam_turn=lam,
        last_values=_truncation_values(batch) if bootstrap else None,
    )
    return made.write(estimates[0]), made.write(estimates[1])


def turn_gae(batch: Batch, *, gamma: float, lam: float, bootstrap: bool) -> tuple[Tensor, Tensor]:
    """GAE over the turns of a trajectory, each valued at its first decision; [B, T] as above.

    The decisions of a turn share its advantage, and its return as what their values are to become.
    """
    made, rewards = decisions(batch), step_rewards(batch)
    values = torch.zeros_like(rewards)
    owners = torch.arange(len(rewards), device=rewards.device)[:, None].expand_as(made.turns)
    values[owners[made.first], made.turns[made.first]] = made.read(
        require_tensor(batch.values, "values").double()
    )[made.first]
    estimates = functional.gae(
        rewards,
        values,
        has_decision(batch),
        torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards),
        gamma_turn=gamma,
        lam_turn=lam,
        last_values=_truncation_values(batch) if bootstrap else None,
    )
    advantages, returns = (
        functional.broadcast_turns_to_tokens(table, batch.turns, batch.trajectory, batch.sampled)
        for table in estimates
    )
    return advantages, returns


def row_gae(batch: Batch, *, invalid_penalty: float) -> tuple[Tensor, Tensor]:
    """The score of every turn, `row_scores`, less the value of each decision; [B, T] as above.

    That is GAE without discounts over the decisions of a turn, the score being the reward of the last.
    """
    scores = functional.broadcast_turns_to_tokens(
        row_scores(batch, invalid_penalty), batch.turns, batch.trajectory, batch.sampled
    )
    return torch.where(batch.sampled, scores - require_tensor(batch.values, "values"), 0.0), scores


@requires("values", "values:grad")
def value_error(outputs: Outputs, mini: MiniBatch, context: Context, *, clip: float) -> Tensor:
    """Half the squared error of the values, clipped around those of the scoring pass; [B, T]."""
    batch = mini.batch
    return functional.value_loss(
        require_tensor(outputs.values, "values:grad"),
        require_tensor(batch.values, "values"),
        require_tensor(batch.targets, "targets"),
        clip,
    )


@requires("values")
def value_metrics(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """The share of the returns' variance that the values explain (1 is all), where returns differ."""
    batch = mini.batch
    targets = require_tensor(batch.targets, "targets")[batch.sampled].double()
    values = require_tensor(batch.values, "values")[batch.sampled].double()
    if not len(targets):
        return {}
    numbers = {"value_mean": float(values.mean()), "return_mean": float(targets.mean())}
    variance = float(targets.var(correction=0))
    if variance > 0:
        numbers["explained_variance"] = 1 - float((targets - values).var(correction=0)) / variance
    return numbers


def _truncation_values(batch: Batch) -> Tensor | None:
    """The value after the last token where a limit ended an episode, 0 where it came to its end; [E]."""
    cut = torch.tensor([episode.stop in _CUT_OFF for episode in batch.episodes], device=batch.tokens.device)
    if not bool(cut.any()):
        return None
    return torch.where(cut, require_tensor(batch.last_values, "last_values"), 0.0)
