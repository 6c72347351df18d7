"""Branch policy of trees: every first rollout forks at points of its own, once it has ended."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

from agentrl.algorithms.branching import point_scores
from agentrl.algorithms.hooks import BRANCHES, Context, requires, trait
from agentrl.data.trajectory import BranchPoint, Episode, Turn
from agentrl.seeds import derive_seed

ChoosePoints = Callable[[Episode, int, Context], Sequence[BranchPoint]]


@trait(BRANCHES)
@requires("rollout:entropy")
@dataclass
class Trees:
    """Branch policy that plays the trunks of all trees to their end, and then their branches.

    Every trunk gets the same number of branches, and each of its points the same part of them. What cannot be
    divided, and all branches of a trunk without points or of an aborted one, start at the first observation.

    Args:
        budget: The number of episodes of the task.
        seed: The seed of the choice of points.
        context: Passed to `points`.
        trunks: The number of trees.
        branches: The number of branches from a point.
        points: (ended trunk, seed, context) -> the points at which it forks.
    """

    revisits: ClassVar[bool] = True

    budget: int
    seed: int
    context: Context
    _: KW_ONLY
    trunks: int
    branches: int
    points: ChoosePoints
    _ended: list[Episode] = field(default_factory=list, init=False)

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start the trunks."""
        return [None] * self.trunks

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start nothing: branches start only after the trunks have ended."""
        return ()

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start the branches when the last trunk has ended."""
        if len(self._ended) == self.trunks:
            return ()
        self._ended.append(episode)
        if len(self._ended) < self.trunks:
            return ()
        # The names of branches follow from their order, so it must not be the one in which trunks ended.
        trunks = sorted(self._ended, key=lambda trunk: trunk.id)
        slots = (self.budget - self.trunks) // self.trunks
        return [point for trunk in trunks for point in self._branches(trunk, slots)]

    def _branches(self, trunk: Episode, slots: int) -> Sequence[BranchPoint]:
        points = () if trunk.stop.aborted else self.points(trunk, self.seed, self.context)
        forked = [point for point in points for _ in range(self.branches)][:slots]
        return [*forked, *[BranchPoint(trunk.id, 0)] * (slots - len(forked))]


@dataclass
class FromTheStart:
    """Branch policy without branches: all episodes start at the first observation.

    Args:
        budget: The number of episodes of the task.
        seed: Not read.
        context: Not read.
    """

    budget: int
    seed: int
    context: Context

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start all episodes."""
        return [None] * self.budget

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start nothing."""
        return ()

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start nothing."""
        return ()


def critical_point(trunk: Episode, seed: int, context: Context, *, among: int) -> Sequence[BranchPoint]:
    """Draw one of the most uncertain words of an episode, at which it is left before that word.

    Candidates are action tokens of at least two characters without white space around them; the first action
    token of the episode and special tokens are none. Without a tokenizer, all tokens count as words.

    Args:
        trunk: The ended episode, with the entropies of its action tokens.
        seed: The seed of the draw, which also depends on the episode.
        context: Knows the texts of tokens.
        among: The number of candidates with the highest entropies that one is drawn from, uniformly.

    Source: Li et al. 2025, arXiv:2508.11016 (its released code).
    """
    scores = {
        place: entropy
        for place, entropy in point_scores(trunk, "token", "entropy").items()
        if _is_word(trunk.turns[place[0]].action_ids[place[1]], context)
    }
    candidates = sorted(sorted(scores, key=lambda place: -scores[place])[:among])
    if not candidates:
        return ()
    return [BranchPoint(trunk.id, *candidates[derive_seed(seed, "critical", trunk.id) % len(candidates)])]


def _is_word(token: int, context: Context) -> bool:
    return context.token_text is None or len(context.token_text(token).strip()) > 1
