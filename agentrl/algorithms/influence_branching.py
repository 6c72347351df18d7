"""Branches after tokens that were uncertain and whose future became likelier, and their credit (APPO)."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.features import reply_positions
from agentrl.algorithms.hooks import Context, requires
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Episode, Turn

FirstRollouts = int | Literal["half"]
Rank = tuple[float, ...]
OMEGA = (0.8, 1.2)  # the limits of a future ratio


@requires("rollout:entropy", "rollout:scores")
@dataclass
class InfluenceBranching:
    """Branch policy that plays first rollouts to their end, and then branches after chosen tokens of them.

    A branch shares its parent's tokens up to and including the chosen one. Tokens are ordered by
    `functional.influence_scores`, those with both z above 0 first, and those with both below 0 last, although
    their score is positive. Where scores are equal, as for a sampler that is the learner, the least certain
    token comes first. The last decision of an episode is followed by nothing and starts no branch. Rollouts
    that were aborted have no branches; what is left of the budget starts at the first observation.

    Args:
        budget: The number of episodes of the task.
        seed: Not read.
        context: Provides the learner's scores; without them, they are those of the sampler.
        initial: The number of first rollouts: a number, or `half` of the budget.

    Source: arXiv:2606.12384.
    """

    budget: int
    seed: int
    context: Context
    _: KW_ONLY
    initial: FirstRollouts = "half"
    _ended: list[Episode] = field(default_factory=list, init=False)

    @property
    def first(self) -> int:
        """Return the number of first rollouts."""
        return max(self.budget // 2, 1) if self.initial == "half" else min(self.initial, self.budget)

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start the first rollouts."""
        return [None] * self.first

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start nothing: branches start only after the first rollouts have ended."""
        return ()

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start the branches when the last of the first rollouts has ended."""
        if len(self._ended) == self.first:
            return ()
        self._ended.append(episode)
        if len(self._ended) < self.first:
            return ()
        finished = sorted((each for each in self._ended if not each.stop.aborted), key=lambda each: each.id)
        ranked = [entry for each in finished for entry in self._ranked(each)]
        chosen = sorted(ranked, key=lambda entry: entry[0])[: self.budget - self.first]
        return [point for _, point in chosen]

    def _ranked(self, episode: Episode) -> list[tuple[Rank, BranchPoint]]:
        """Return the branch points of an episode with their ranks, the lowest of which comes first."""
        places = [
            (index, token)
            for index, turn in enumerate(episode.turns)
            for token, own in enumerate(turn.action_mask)
            if own
        ]
        entropies = [[episode.turns[turn].entropies[token] for turn, token in places]]
        mask = torch.ones(1, len(places), dtype=torch.bool)
        ratios = functional.future_ratio(torch.tensor([self._log_ratios(episode, places)]).double(), mask)
        scores = functional.influence_scores(torch.tensor(entropies).double(), ratios.clamp(*OMEGA), mask)
        numbers = torch.cat(scores).round(decimals=9).T.tolist()
        # Forced tokens after the last decision of a turn need not be written again.
        points = [
            BranchPoint(episode.id, turn, token + 1) if after == turn else BranchPoint(episode.id, after)
            for (turn, token), (after, _) in pairwise(places)
        ]
        return [(_rank(*each), point) for each, point in zip(numbers, points, strict=False)]

    def _log_ratios(self, episode: Episode, places: Sequence[tuple[int, int]]) -> list[float]:
        """Return the learner's less the sampler's log-probability of each decision."""
        if self.context.score is None:
            return [0.0] * len(places)
        scored = self.context.score(episode)
        return [scored[turn][token] - episode.turns[turn].logprobs[token] for turn, token in places]


def _rank(score: float, uncertain: float, influential: float) -> Rank:
    both, neither = min(uncertain, influential) > 0, max(uncertain, influential) < 0
    return float(not both), float(neither), -score, -uncertain


def first_rollouts(batch: Batch) -> Tensor:
    """Return whether each trajectory shares no token with another that it branched off; [E] bool."""
    points = [episode.parent for episode in batch.episodes]
    first = [point is None or (point.turn, point.token) == (0, 0) for point in points]
    return torch.tensor(first, dtype=torch.bool, device=batch.tokens.device)


def branch_credit(values: Tensor, batch: Batch) -> Tensor:
    """Average, at every action token, the values of the branches that share it; [B, T], 0 without any.

    Args:
        values: [E], of every trajectory.
        batch: The rows.
    """
    numbers = {
        (group, episode.id): index
        for index, (group, episode) in enumerate(zip(batch.groups.tolist(), batch.episodes, strict=True))
    }
    positions = reply_positions(batch)
    total = torch.zeros(batch.tokens.shape, dtype=values.dtype, device=values.device)
    count = torch.zeros_like(total)
    for index, (group, episode) in enumerate(zip(batch.groups.tolist(), batch.episodes, strict=True)):
        point = episode.parent
        owner = None if point is None else numbers.get((group, point.parent))
        if point is None or owner is None:
            continue
        before = (batch.turns < point.turn) | ((batch.turns == point.turn) & (positions < point.token))
        shared = batch.action_mask & before & (batch.trajectory == owner)[:, None]
        total = total + torch.where(shared, values[index], 0.0)
        count = count + shared
    return total / count.clamp(min=1)
