"""Frozen records of what happened. Token ids are what the policy read and wrote; text is for people."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class StopReason(StrEnum):
    """Why an episode ended; only the first two are the environment's own doing."""

    TERMINATED = "terminated"  # the task reached a terminal state, good or bad
    TRUNCATED = "truncated"  # the environment's step limit
    TURN_LIMIT = "turn_limit"  # the collector's limit
    CONTEXT_LIMIT = "context_limit"  # the next prompt would not fit the policy's context
    ENV_ERROR = "env_error"  # an exception inside the environment; see Episode.error
    CONTRACT = "contract"  # the environment answered, but not as the contract says
    WORKER_ERROR = "worker_error"  # the environment's process died, hung or was killed
    ENGINE_ERROR = "engine_error"  # generation failed after its retries

    @property
    def aborted(self) -> bool:
        """Whether the episode says nothing about the policy."""
        return self in _ABORTED


_ABORTED = frozenset(
    {StopReason.ENV_ERROR, StopReason.CONTRACT, StopReason.WORKER_ERROR, StopReason.ENGINE_ERROR}
)


class Outcome(StrEnum):
    """Three-valued: an aborted episode is neither a success nor a failure, and never a reward of 0."""

    SUCCESS = "success"
    FAILURE = "failure"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """Where an episode forked off another: after `token` action tokens of `turn` of the episode `parent`."""

    parent: str
    turn: int
    token: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One observation and the reply to it.

    `prompt_ids` are the tokens fed since the previous reply. They extend the sequence of the turn before,
    or begin a new one when `new_sequence` (always true for turn 0), so nothing is ever stored twice or
    encoded again. `action_ids`, `logprobs`, `entropies` and `allowed` have one entry per reply token;
    `logprobs` and `entropies` are nats under the sampling distribution (over the allowed ids where the reply
    was constrained). Of a reply that thought before it chose, `allowed` is None at each thought.

    Example: Turn("You see a mug 1.", "take mug 1", (5, 9), (7, 3), (-0.7, 0.0), (0.69, 0.0), ((7, 8), (3,)))
    has two reply tokens of which only the first was a decision.

    `policy_version` is that of the weights that drew the reply; where they changed in its course, that of
    its first token, and `policy_versions` has one entry per reply token.
    """

    observation: str
    action: str
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    allowed: tuple[tuple[int, ...] | None, ...] | None = None  # None: every id was allowed at every token
    reward: float = 0.0  # the environment's, for this reply
    new_sequence: bool = False
    valid: bool = True  # the reply was parsed and understood
    trainable: bool = True  # False: written by noise or a tool; it stays in the context and out of every loss
    finish: str = "stop"  # stop | length
    policy_version: int = 0
    policy_versions: tuple[int, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)  # score, task_type, state_key, …; JSON values

    @property
    def sampled(self) -> tuple[bool, ...]:
        """Per reply token, whether it was a decision: a token with a single allowed id was not."""
        if not self.trainable:
            return (False,) * len(self.action_ids)
        if self.allowed is None:
            return (True,) * len(self.action_ids)
        return tuple(ids is None or len(ids) > 1 for ids in self.allowed)

    @property
    def entropy(self) -> float | None:
        """Mean entropy in nats over the decisions of this turn; None without any."""
        values = [entropy for entropy, decided in zip(self.entropies, self.sampled, strict=False) if decided]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Episode:
    """A played task, from reset to its stop reason.

    `turns[k].reward` answers `turns[k].action`. `final_observation` is what the environment said after the
    last reply.
    """

    id: str
    env: str
    task: str
    seed: int
    turns: tuple[Turn, ...]
    stop: StopReason
    success: bool = False
    error: str | None = None
    task_type: str | None = None
    parent: BranchPoint | None = None
    final_observation: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.stop.aborted:
            return Outcome.ABORTED
        return Outcome.SUCCESS if self.success else Outcome.FAILURE

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of rewards, in the environment's units."""
        return sum(turn.reward for turn in self.turns)

    @property
    def entropy(self) -> float | None:
        """Trajectory entropy in nats: the mean over turns of each turn's mean; None without any decision."""
        values = [entropy for turn in self.turns if (entropy := turn.entropy) is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Group:
    """Episodes of one task whose returns are compared."""

    task: str
    episodes: tuple[Episode, ...]

    @property
    def finished(self) -> tuple[Episode, ...]:
        """The members that enter a baseline: all but the aborted."""
        return tuple(episode for episode in self.episodes if not episode.stop.aborted)
