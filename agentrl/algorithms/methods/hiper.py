"""HiPER: a reply keeps or switches its subgoal, and each of the three decisions has its own advantage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.features import has_decision, turns_to_tokens
from agentrl.algorithms.functional import Hierarchical
from agentrl.algorithms.hooks import Context, MiniBatch, Term, requires, trait
from agentrl.algorithms.methods.ppo import value_error
from agentrl.algorithms.plans import (
    Part,
    part_tokens,
    plan_estimates,
    plan_of,
    segment_starts,
    starts_of,
    value_places,
)
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import PositiveWeight, Share, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode

Estimate = Callable[[Batch], tuple[Hierarchical, Tensor]]


@recipe("hiper")
@dataclass(frozen=True)
class HiPER(ClippedRecipe):
    """Hierarchical credit: for the action of a turn, for the subgoal of a segment, and for ending one.

        A_action  = GAE within the segment, with the value of the next segment's beginning ahead
        A_subgoal = GAE over segments, at the first turn of each
        A_switch  = return of the rest of the segment, with that value ahead, less the value of the turn

    Replies have the format `policy.reply=subgoal_action`. A segment begins in the first turn and wherever a
    reply says SWITCH; a reply that says neither keeps its subgoal. See `functional.hierarchical_gae`. Each
    advantage is whitened over its turns, and acts on the tokens of its part: the switch, the subgoal where a
    segment begins, and the action. Other tokens are not learned from. A reply without <action> is an action
    as a whole, and its advantages add up. So are replies of other formats: all turns then keep the subgoal,
    and what remains is GAE over turns; `hiper/planned` is the share of replies in the format.

    The released critic has three heads. Ours has one, whose value is read before the first token of a reply
    (for subgoal and switch) and before the first token after the subgoal (for the action): what it predicts
    is the return in all three cases. It learns at these tokens alone, and its loss is the mean over them.

        field               | paper  | released | ours
        dual_clip           | null   | 3.0      | null
        aggregation         | token  | token    | token
        drop_equal_groups   | false  | false    | false
        bootstrap_truncated | false  | true     | false
        keep_penalty        | 0.3    | 0.3      | 0.0
        change_penalty      | 0.3    | 0.3      | 0.0

    The penalties of the presets are those for ALFWorld, whose success is worth 10 in the released code; for
    WebShop it has keep_share_penalty 3.5 and no keep_penalty. It ran 128 trajectories, with learning rates of
    1e-6 and, for the critic, 1e-5; here the value head learns at the rate of the policy.

    Args:
        gamma: The discount from one turn to the next.
        lam: The GAE lambda between turns of a segment.
        lam_segment: The GAE lambda between segments.
        bootstrap_truncated: Whether truncated episodes end with their last value instead of 0.
        keep_penalty: The price of every turn, but the first, that keeps its subgoal, in reward units.
        keep_share_penalty: The price of an episode that always keeps its subgoal, in proportion to the share
            of the turns after the first that do, paid in its last turn.
        change_penalty: The price of a turn that says KEEP and writes another subgoal than the turn before.
        value_coefficient: The coefficient of the value loss, half a square in reward units.
        value_clip: The maximum change of a value from the scoring pass, in reward units.

    The remaining fields are those of `ClippedRecipe`; two defaults differ.

    Source: arXiv:2602.16165.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"keep_penalty": 0.3, "change_penalty": 0.3},
        "released": {"keep_penalty": 0.3, "change_penalty": 0.3, "bootstrap_truncated": True},
    }

    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "token"
    drop_equal_groups: bool = False
    gamma: Share = 1.0
    lam: Share = 1.0
    lam_segment: Share = 0.95
    bootstrap_truncated: bool = False
    keep_penalty: Weight = 0.0
    keep_share_penalty: Weight = 0.0
    change_penalty: Weight = 0.0
    value_coefficient: Weight = 0.5
    value_clip: PositiveWeight = 0.5

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        estimate = partial(
            plan_estimates,
            gamma=self.gamma,
            lam=self.lam,
            lam_segment=self.lam_segment,
            bootstrap=self.bootstrap_truncated,
        )
        prices = (self.keep_penalty, self.keep_share_penalty, self.change_penalty)
        shaped = (partial(charge_plans, prices=prices),) if any(prices) else ()
        read = ("values", "last_values") if self.bootstrap_truncated else ("values",)
        value = partial(value_error, clip=self.value_clip)
        return replace(
            plain,
            shape_reward=(*plain.shape_reward, *shaped),
            advantage=requires(*read)(partial(hierarchical_advantage, estimate=estimate)),
            targets=requires(*read)(partial(plan_returns, estimate=estimate)),
            masks=(planned_tokens,),
            terms=(*plain.terms, Term("value", value, self.value_coefficient, where=valued_tokens)),
            diagnostics=(*plain.diagnostics, plan_metrics),
        )


@trait("advantage within a turn")
def hierarchical_advantage(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """Return the whitened advantage of each token's part of its reply; [B, T] float64."""
    found, _ = estimate(batch)
    present, starts = has_decision(batch), segment_starts(batch)
    total = torch.zeros(batch.tokens.shape, dtype=torch.float64, device=batch.tokens.device)
    levels: tuple[tuple[Part, Tensor, Tensor], ...] = (
        ("action", found.action, present),
        ("subgoal", found.subgoal, starts),
        ("switch", found.switch, present),
    )
    for part, values, turns in levels:
        shared = turns_to_tokens(functional.whiten(values, turns), batch)
        total = total + torch.where(part_tokens(batch, part), shared, 0.0)
    return total


def plan_returns(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """Return the targets of the values, at the tokens that have one; [B, T]."""
    return estimate(batch)[1]


def planned_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the tokens with an advantage: actions, switches, subgoals that begin a segment; [B, T] bool."""
    batch = mini.batch
    begins = turns_to_tokens(segment_starts(batch).double(), batch) > 0
    said = part_tokens(batch, "action") | part_tokens(batch, "switch")
    return said | (part_tokens(batch, "subgoal") & begins)


def valued_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """Return the weights that make a mean over action tokens one over those with a value; [B, T]."""
    made, first, begins = value_places(mini.batch)
    places = made.write(first | begins)
    return places * (mini.batch.action_mask.sum() / places.sum().clamp(min=1))


def charge_plans(episode: Episode, context: Context, *, prices: tuple[float, float, float]) -> list[float]:
    """Return the rewards less the prices of keeping a subgoal, of always doing so, and of changing it."""
    keep, keep_share, change = prices
    rewards = [turn.reward for turn in episode.turns]
    kept = 0
    for index, (turn, before) in enumerate(zip(episode.turns[1:], episode.turns, strict=False), start=1):
        plan, earlier = plan_of(turn), plan_of(before)
        if plan and not plan["switched"]:
            kept += 1
            changed = "goal" in plan and "goal" in earlier and plan["goal"] != earlier["goal"]
            rewards[index] -= keep + (change if changed else 0.0)
    if kept:
        rewards[-1] -= keep_share * kept / (len(rewards) - 1)
    return rewards


def plan_metrics(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """Measure the shares of planned replies and of later turns that switch, and the turns of a segment."""
    episodes = [episode for episode in mini.batch.episodes if episode.turns]
    plans = [[plan_of(turn) for turn in episode.turns] for episode in episodes]
    turns, later = sum(map(len, plans)), sum(len(row) - 1 for row in plans)
    if not turns:
        return {}
    numbers = {
        "hiper/planned": sum("switch" in plan and "subgoal" in plan for row in plans for plan in row) / turns,
        "hiper/segment_turns": turns / max(1, sum(sum(starts_of(episode)) for episode in episodes)),
    }
    switched = sum(bool(plan.get("switched")) for row in plans for plan in row[1:])
    return numbers | ({"hiper/switched": switched / later} if later else {})
