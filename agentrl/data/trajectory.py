"""Frozen records of episodes. Token ids are what the policy read and wrote; text is for people."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class StopReason(StrEnum):
    """Why an episode ended; only the first two are decided by the environment itself."""

    TERMINATED = "terminated"  # the task reached a terminal state, good or bad
    TRUNCATED = "truncated"  # the environment's step limit
    TURN_LIMIT = "turn_limit"  # the collector's limit
    CONTEXT_LIMIT = "context_limit"  # the next prompt would not fit the policy's context
    ENV_ERROR = "env_error"  # an exception inside the environment; see Episode.error
    CONTRACT = "contract"  # the environment returned something that violates its contract
    WORKER_ERROR = "worker_error"  # the environment's process died, hung or was killed
    ENGINE_ERROR = "engine_error"  # generation failed after its retries

    @property
    def aborted(self) -> bool:
        """Return whether the episode failed for reasons that say nothing about the policy."""
        return self in _ABORTED


_ABORTED = frozenset(
    {StopReason.ENV_ERROR, StopReason.CONTRACT, StopReason.WORKER_ERROR, StopReason.ENGINE_ERROR}
)


class Outcome(StrEnum):
    """Outcome of an episode; an aborted one is neither a success nor a failure, and never a reward of 0."""

    SUCCESS = "success"
    FAILURE = "failure"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """Point where an episode branched off: after `token` action tokens of turn `turn` of episode `parent`."""

    parent: str
    turn: int
    token: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One observation and the policy's reply to it.

    `prompt_ids` are the tokens added since the previous reply. They extend the sequence of the previous turn,
    or begin a new one if `new_sequence` (always true for turn 0), so no token is stored or encoded twice.
    `action_ids`, `logprobs`, `entropies` and `allowed` have one entry per reply token. `logprobs` and
    `entropies` are in nats under the sampling distribution (over the allowed ids if the reply was
    constrained). Where a constrained reply begins with reasoning, `allowed` is None at the reasoning tokens.

    Example: Turn("You see a mug 1.", "take mug 1", (5, 9), (7, 3), (-0.7, 0.0), (0.69, 0.0), ((7, 8), (3,)))
    has two reply tokens, of which only the first was a decision.

    `policy_version` is the version of the weights that generated the reply. If the weights changed during
    the reply, it is the version at the first token, and `policy_versions` has one entry per reply token.
    `temperature` and `temperatures` say in the same way at which temperature the reply was sampled; 0 is
    greedy, with the `logprobs` and `entropies` of temperature 1.
    """

    observation: str
    action: str
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    allowed: tuple[tuple[int, ...] | None, ...] | None = None  # None: every id was allowed at every token
    reward: float = 0.0  # from the environment, for this reply
    new_sequence: bool = False
    valid: bool = True  # whether the reply was parsed and understood
    trainable: bool = True  # False for text of noise or a tool: kept in the context, excluded from every loss
    finish: str = "stop"  # stop | length
    policy_version: int = 0
    policy_versions: tuple[int, ...] = ()
    temperature: float | None = None  # None: not recorded, or not sampled
    temperatures: tuple[float, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)  # score, task_type, state_key, …; JSON values

    @property
    def action_mask(self) -> tuple[bool, ...]:
        """Return for each reply token whether it was a decision; a token with one allowed id was not."""
        if not self.trainable:
            return (False,) * len(self.action_ids)
        if self.allowed is None:
            return (True,) * len(self.action_ids)
        return tuple(ids is None or len(ids) > 1 for ids in self.allowed)

    @property
    def action_entropies(self) -> list[float]:
        """Return the entropies of the decisions of this turn, in nats."""
        decided = self.action_mask
        return [entropy for entropy, own in zip(self.entropies, decided, strict=False) if own]

    @property
    def entropy(self) -> float | None:
        """Return the mean entropy in nats over the decisions of this turn, or None if it has none."""
        values = self.action_entropies
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Episode:
    """One attempt at a task, from reset to the end.

    `turns[k].reward` is the reward for `turns[k].action`. `final_observation` is the observation after the
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
        """Return whether the episode succeeded, failed or was aborted."""
        if self.stop.aborted:
            return Outcome.ABORTED
        return Outcome.SUCCESS if self.success else Outcome.FAILURE

    @property
    def episode_return(self) -> float:
        """Return the undiscounted sum of rewards, in the environment's units."""
        return sum(turn.reward for turn in self.turns)

    @property
    def longest_sequence(self) -> int:
        """Return the number of tokens of the longest sequence; a turn with a new sequence begins one."""
        longest = length = 0
        for turn in self.turns:
            length = (0 if turn.new_sequence else length) + len(turn.prompt_ids) + len(turn.action_ids)
            longest = max(longest, length)
        return longest

    @property
    def entropy(self) -> float | None:
        """Return the mean over turns of the turn entropy, in nats, or None without any decision."""
        values = [entropy for turn in self.turns if (entropy := turn.entropy) is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Group:
    """Episodes of one task whose returns are compared with each other."""

    task: str
    episodes: tuple[Episode, ...]

    @property
    def finished(self) -> tuple[Episode, ...]:
        """Return the episodes that enter a baseline: all that were not aborted."""
        return tuple(episode for episode in self.episodes if not episode.stop.aborted)
