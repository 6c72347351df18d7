"""Branching: episodes that start at a point of another episode, and the uncertain points to start them at."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean, quantiles
from typing import Any, Literal, Protocol

from agentrl.algorithms.hooks import Coefficient, Context, EndThoughts, ReplyTemperature, TurnGate
from agentrl.data.trajectory import BranchPoint, Episode, Turn
from agentrl.errors import ConfigError

OPENING = 20  # action tokens of a turn whose entropy stands for the turn
MIN_GAP = 3  # points: closer ones count as the same uncertain moment, with `quantile`

AnchorUnit = Literal["auto", "token", "turn"]
Uncertainty = Literal["entropy", "surprisal", "quantile"]


class BranchPolicy(Protocol):
    """Policy that decides, while episodes are played, which episodes one task gets.

    A start is None for an episode from the first observation, or a point of another episode at which the new
    one branches off: `BranchPoint(parent, turn, token)` starts in the state before that turn, with the first
    `token` tokens of the parent's reply. The rollout names the episodes and never starts more than the
    budget. When all have ended and the budget is not used up, it starts the rest from the first observation.

    A policy that returns to ended episodes later than in the call of `ended` for them has an attribute
    `revisits = True`: the engine then keeps what it has read of them until the budget is spent.
    """

    def begin(self) -> Sequence[BranchPoint | None]:
        """Return the starts of the first episodes."""
        ...

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Return the starts of new episodes after the environment's answer to the last turn.

        It is not called if that answer ended the episode. `turns` are those since the first observation,
        including the parent's.
        """
        ...

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Return the starts of new episodes once an episode has ended or was aborted."""
        ...


BranchPolicyFactory = Callable[[int, int, Context], BranchPolicy]


@dataclass(frozen=True)
class RolloutPlan:
    """Settings of the rollout that an algorithm asks for.

    Args:
        temperature: The sampling temperature as a function of the context; None takes the configured one.
        reply_temperature: The temperature of each reply, or of each of its tokens: (state before the reply,
            context) -> number or `TokenTemperature`. None samples all replies at that of the step.
        rounds: The maximum number of rounds in which a step's tasks are drawn and played until `select` has
            kept as many groups as configured. The groups of the last round fill up what is missing.
        episodes: The number of episodes per task; None takes the configured group size.
        branch_policy: (episodes of the task, seed, context) -> the policy that decides where episodes start;
            None starts all of them at the first observation.
        turn_gate: (state before the reply, reply, context) -> whether the environment gets it. A refused
            reply leaves no trace but its count and tokens in the turn's info, as `discarded_replies` and
            `discarded_tokens`, and another one is sampled at the same state.
        resamples: The maximum number of refused replies of a turn; the next one is accepted in any case.
        end_thoughts: (entropies, confidences of the reasoning so far, context) -> whether to end it now. The
            tokens that end it are forced, and the turn's info has `intervened`.
        confidence: The number of most likely tokens that a confidence is over; 0 measures none.
        second: How many of `episodes`, the last ones of each task, are a second rollout. `reply_temperature`
            samples them at a temperature of their own, and the learner scores them at that of the step.
    """

    temperature: Coefficient | None = None
    reply_temperature: ReplyTemperature | None = None
    rounds: int = 1
    episodes: int | None = None
    branch_policy: BranchPolicyFactory | None = None
    turn_gate: TurnGate | None = None
    resamples: int = 0
    end_thoughts: EndThoughts | None = None
    confidence: int = 0
    second: int = 0

    def __post_init__(self) -> None:
        if self.second and not 0 < self.second < (self.episodes or 0):
            raise ConfigError(f"second is {self.second}, wanted less than episodes, {self.episodes}")


def own_rollout(plan: RolloutPlan, method: str, **changes: Any) -> RolloutPlan:
    """Return the plan of a base with the changes of a method that decides which episodes a task gets.

    Raises:
        ConfigError: If the base decides that, or the temperature of each reply, as well.
    """
    if plan.branch_policy is not None or plan.episodes is not None or plan.reply_temperature is not None:
        raise ConfigError(
            f"{method}: the base decides where episodes start, how many there are, or how hot their replies "
            "are; wanted a base that leaves the rollout as it is"
        )
    return replace(plan, **changes)


def opening_entropy(turn: Turn, vocabulary: int, *, total: bool = False) -> float | None:
    """Return the mean entropy of a turn's first 20 action tokens, or None if it has none.

    The unit is the logarithm of the vocabulary size.

    Args:
        turn: A turn with the entropies of its action tokens.
        vocabulary: The number of tokens; below 2 (unknown), the result is in nats.
        total: Return the sum of the entropies instead of the mean.
    """
    opening = turn.action_entropies[:OPENING]
    if not opening:
        return None
    scale = math.log(vocabulary) if vocabulary > 1 else 1.0
    return sum(opening) / (1 if total else len(opening)) / scale


def anchor_points(
    base: Episode, count: int, *, unit: AnchorUnit = "auto", score: Uncertainty = "entropy"
) -> list[BranchPoint]:
    """Return the most uncertain points of an episode, in order; ties go to the earlier point.

    Args:
        base: An episode with the entropies and logprobs of its action tokens.
        count: The maximum number of points.
        unit: `token` or `turn` points; `auto` takes turns if the episode has more than one.
        score: The measure of uncertainty: `entropy`, `surprisal`, or `quantile`, see `FR3E`.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """
    scores = point_scores(base, unit, score)
    places, values = list(scores), list(scores.values())
    order = sorted(range(len(values)), key=lambda index: -values[index])
    if score == "quantile":
        order = _spaced_apart(order, values)
    return [BranchPoint(base.id, *places[index]) for index in sorted(order[:count])]


def point_scores(base: Episode, unit: AnchorUnit, score: Uncertainty) -> dict[tuple[int, int], float]:
    """Return the uncertainty of each point of an episode, in nats, by (turn, token) in order.

    The point before the first action token is left out, because it is the start of the episode.
    """
    decided = [
        action_token_values(
            turn, [-logprob for logprob in turn.logprobs] if score == "surprisal" else turn.entropies
        )
        for turn in base.turns
    ]
    if unit == "turn" or (unit == "auto" and len(base.turns) > 1):
        points = {(turn, 0): fmean(values.values()) for turn, values in enumerate(decided) if values}
    else:
        points = {
            (turn, token): value for turn, values in enumerate(decided) for token, value in values.items()
        }
    return dict(islice(points.items(), 1, None))


def action_token_values(turn: Turn, values: Sequence[float]) -> dict[int, float]:
    """Return the values of a turn's action tokens, by position in the reply."""
    return {
        token: value
        for token, (value, action_mask) in enumerate(zip(values, turn.action_mask, strict=False))
        if action_mask
    }


def _spaced_apart(order: Sequence[int], values: Sequence[float]) -> list[int]:
    """Return the points of the upper quarter that are not close to a more uncertain one."""
    if len(values) < 2:
        return list(order)
    bar = quantiles(values, n=4, method="inclusive")[2]
    chosen: list[int] = []
    for index in order:
        if values[index] >= bar and all(abs(index - other) > MIN_GAP for other in chosen):
            chosen.append(index)
    return chosen
