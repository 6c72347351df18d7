"""Branch policies: from the most uncertain points of an ended episode, or where one has become uncertain."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal

from agentrl.algorithms import functional
from agentrl.algorithms.branching import AnchorUnit, Uncertainty, anchor_points, opening_entropy
from agentrl.algorithms.hooks import BRANCHES, Context, requires, trait
from agentrl.data.trajectory import BranchPoint, Episode, Turn
from agentrl.seeds import derive_seed

BranchRule = Literal["stochastic", "threshold"]
InitialRollouts = int | Literal["measured", "half"]


@trait(BRANCHES)
@requires("rollout:entropy")
@dataclass
class AnchorExploration:
    """Branch policy that plays bases to their end, and then explores from their most uncertain points.

    Of the bases, one that succeeded and one that failed are explored. Their states are the first observation
    and their most uncertain points, and each state gets the same number of continuations. What remains of
    the budget starts at the first observation, if a base has too few points or was aborted.

    Args:
        budget: The number of episodes of the task.
        seed: The seed of the draw among bases.
        context: Not read.
        bases: The number of bases.
        anchors: The maximum number of uncertain points of a base.
        unit: See `anchor_points`.
        score: See `anchor_points`.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """

    revisits: ClassVar[bool] = True

    budget: int
    seed: int
    context: Context
    _: KW_ONLY
    bases: int
    anchors: int
    unit: AnchorUnit = "auto"
    score: Uncertainty = "entropy"
    _ended: list[Episode] = field(default_factory=list, init=False)

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start the bases."""
        return [None] * self.bases

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start nothing: continuations start only after the bases have ended."""
        return ()

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start the continuations when the last base has ended."""
        if len(self._ended) == self.bases:
            return ()
        self._ended.append(episode)
        return self._continuations() if len(self._ended) == self.bases else ()

    def _continuations(self) -> Sequence[BranchPoint]:
        explored = self._explored()
        # An aborted base has no points to go back to, but it starts at the first observation of the task.
        first = BranchPoint((explored or self._ended)[0].id, 0)
        slots = self.budget - len(self._ended)
        each = slots // (max(len(explored), 1) * (self.anchors + 1))
        states = [
            point
            for base in explored
            for point in (
                BranchPoint(base.id, 0),
                *anchor_points(base, self.anchors, unit=self.unit, score=self.score),
            )
        ]
        return [first] * (slots - each * len(states)) + [point for point in states for _ in range(each)]

    def _explored(self) -> list[Episode]:
        """Draw at most one finished base that succeeded and one that failed."""
        finished = sorted((base for base in self._ended if not base.stop.aborted), key=lambda base: base.id)
        kinds = ([base for base in finished if base.success is success] for success in (True, False))
        return [kind[derive_seed(self.seed, "base", kind[0].success) % len(kind)] for kind in kinds if kind]


@trait(BRANCHES)
@requires("rollout:entropy")
@dataclass
class EntropyBranching:
    """Branch policy that branches where a turn was less certain than the first turn of its path.

    See `functional.branch_score` for the score of a state, and `opening_entropy` for a turn's entropy. A turn
    without action tokens starts no branch.

    Args:
        budget: The number of episodes of the task.
        seed: The seed of the draws, each of which also depends on the episode, the turn and the attempt.
        context: Provides the size of the vocabulary; if it is unknown, entropies stay in nats.
        initial: The number of rollouts that start at the first observation: a number, `half` of the budget,
            or `measured` by the first of them, which is then played alone (`functional.initial_rollouts`).
        slope: The slope of the measured split.
        rule: `stochastic` draws the offset in [0, 1) for every attempt, `threshold` takes `offset`.
        bar: The score that must be reached (`stochastic`) or exceeded (`threshold`).
        offset: The offset of `threshold`.
        weight: The weight of the change of entropy.
        penalty: The share subtracted for every reply in a row that has branched.
        beam: The maximum number of paths after a reply, including the original one.
        released: Follow the released code of AEPO: sums of entropies instead of means; branches compared with
            their own first turn; a streak over all paths of the task; the split rounded down plus 1, with
            the first turn among the later ones.

    Source: Dong et al. 2025, arXiv:2510.14545.
    """

    budget: int
    seed: int
    context: Context
    _: KW_ONLY
    initial: InitialRollouts
    slope: float
    rule: BranchRule
    bar: float
    offset: float
    weight: float
    penalty: float
    beam: int = 2
    released: bool = False
    _measuring: bool = field(default=False, init=False)
    _streaks: dict[tuple[str, int], int] = field(default_factory=dict, init=False)  # by path and turns so far
    _task_streak: int = field(default=0, init=False)

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start the first rollouts."""
        self._measuring = self.initial == "measured"
        if self.initial == "measured":
            count = 1
        elif self.initial == "half":
            count = max(self.budget // 2, 1)
        else:
            count = min(self.initial, self.budget)
        return [None] * count

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start a branch for each attempt that succeeds at the current state."""
        entropy = self._entropy(turns[-1])
        if self._measuring or entropy is None:
            return ()
        known = turns[parent.turn :] if parent is not None and self.released else turns
        change = entropy - next(value for turn in known if (value := self._entropy(turn)) is not None)
        streak = self._streak(episode, parent, len(turns) - 1)
        attempts = range(self.beam - 1)
        fired = sum(self._fires(change, streak, episode, len(turns), attempt) for attempt in attempts)
        self._streaks[episode, len(turns)] = self._task_streak = streak + 1 if fired else 0
        return [BranchPoint(episode, len(turns))] * fired

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start the other initial rollouts when the measured one has ended."""
        if not self._measuring:
            return ()
        self._measuring = False
        root, tool = self._profile(episode.turns)
        count = functional.initial_rollouts(self.budget, root, tool, slope=self.slope, round_up=self.released)
        return [None] * (count - 1)

    def _entropy(self, turn: Turn) -> float | None:
        return opening_entropy(turn, self.context.vocabulary, total=self.released)

    def _profile(self, turns: Sequence[Turn]) -> tuple[float, float]:
        """Return the entropy of the first turn and of the later ones; equal if one is unknown."""
        found = [self._entropy(turn) for turn in turns]
        root = found[0] if found else None
        later = [value for value in found[0 if self.released else 1 :] if value is not None]
        if root is None or not later:
            return 0.0, 0.0
        return root, sum(later) / len(later)

    def _streak(self, episode: str, parent: BranchPoint | None, before: int) -> int:
        """Count the replies in a row, up to the last but one, at which the path or its parent branched."""
        if self.released:
            return self._task_streak
        if parent is not None and parent.turn == before:
            return self._streaks.get((parent.parent, before), 0)
        return self._streaks.get((episode, before), 0)

    def _fires(self, change: float, streak: int, episode: str, turns: int, attempt: int) -> bool:
        stochastic = self.rule == "stochastic"
        drawn = derive_seed(self.seed, "branch", episode, turns, attempt) / 2**31
        score = functional.branch_score(
            change,
            streak,
            offset=drawn if stochastic else self.offset,
            weight=self.weight,
            penalty=self.penalty,
        )
        return score >= self.bar if stochastic else score > self.bar
