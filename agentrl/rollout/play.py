"""The one episode loop. It does no input or output: it yields what it needs and is sent the answer.

Whoever drives it (one process, worker processes, Ray) decides where environments and models live; see
`collector`.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentrl.data.trajectory import BranchPoint, Episode, StopReason, Turn
from agentrl.seeds import derive_seed

STORED_INFO = ("success", "score", "valid", "task_type", "state_key", "other_success")


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What is to be played.

    `seed` is the environment's; the player's draws follow from it and `id`. So the members of a group can
    share a seed, and with it their first state, and still differ.
    """

    id: str
    env: str
    task: str
    seed: int
    parent: BranchPoint | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """Ask for the first observation of a task."""

    task: str
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """Ask the environment for its answer to an action."""

    action: str


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """Ask the player for a reply.

    `info` is the environment's last, whole; `actions` its admissible ones, if it told; `seed` is that of the
    episode's draws.
    """

    episode_id: str
    turn: int
    observation: str
    actions: tuple[str, ...] | None
    info: Mapping[str, Any]
    seed: int


@dataclass(frozen=True, slots=True)
class Transition:
    """The environment's answer to `Reset` (reward 0, no end) or `Step`."""

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """The player's answer; the token fields are those of `Turn`, empty for players without tokens."""

    text: str
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    allowed: tuple[tuple[int, ...] | None, ...] | None = None
    fresh: bool = False
    valid: bool = True
    imitable: bool = True
    finish: str = "stop"
    policy_version: int = 0


@dataclass(frozen=True, slots=True)
class Stop:
    """An answer that ends the episode: a failure outside the policy, or a context that is full."""

    reason: StopReason
    error: str | None = None


Effect = Reset | Step | ActionRequest
Answer = Transition | Reply | Stop


def play(spec: EpisodeSpec, max_turns: int | None = None) -> Generator[Effect, Answer, Episode]:
    """Play one episode.

    Yields `Reset` and `Step` (answered by `Transition`) and `ActionRequest` (answered by `Reply`); any of
    them may be answered by `Stop`. Returns the episode, whatever happened: a failure is a value.
    """
    turns: list[Turn] = []
    seed = derive_seed("player", spec.seed, spec.id)
    before = Transition("")
    answer = yield Reset(spec.task, spec.seed)
    while True:
        if isinstance(answer, Stop):
            return _episode(spec, turns, answer.reason, before.info, "", answer.error)
        assert isinstance(answer, Transition)
        before = answer
        if max_turns is not None and len(turns) >= max_turns:
            return _episode(spec, turns, StopReason.TURN_LIMIT, before.info, before.observation)
        actions = before.info.get("actions")
        reply = yield ActionRequest(
            spec.id,
            len(turns),
            before.observation,
            None if actions is None else tuple(actions),
            before.info,
            seed,
        )
        if isinstance(reply, Stop):
            return _episode(spec, turns, reply.reason, before.info, before.observation, reply.error)
        assert isinstance(reply, Reply)
        answer = yield Step(reply.text)
        turns.append(_turn(before, reply, answer))
        if isinstance(answer, Transition) and (answer.terminated or answer.truncated):
            # Where a wrapper sets both flags, the environment's own verdict counts.
            reason = StopReason.TERMINATED if answer.terminated else StopReason.TRUNCATED
            return _episode(spec, turns, reason, answer.info, answer.observation)


def _turn(before: Transition, reply: Reply, answer: Answer) -> Turn:
    after = answer if isinstance(answer, Transition) else Transition("")
    return Turn(
        observation=before.observation,
        action=reply.text,
        prompt_ids=reply.prompt_ids,
        action_ids=reply.action_ids,
        logprobs=reply.logprobs,
        entropies=reply.entropies,
        allowed=reply.allowed,
        reward=after.reward,
        fresh=reply.fresh,
        valid=reply.valid and bool(after.info.get("valid", True)),
        imitable=reply.imitable,
        finish=reply.finish,
        policy_version=reply.policy_version,
        # The anchor is of the state that was acted in; the rest describes what the action led to.
        info={
            key: (before if key == "state_key" else after).info[key]
            for key in STORED_INFO
            if key in (before if key == "state_key" else after).info
        },
    )


def _episode(
    spec: EpisodeSpec,
    turns: list[Turn],
    reason: StopReason,
    info: Mapping[str, Any],
    observation: str,
    error: str | None = None,
) -> Episode:
    success = info.get("success")
    if not reason.aborted and not isinstance(success, bool):
        reason, error = StopReason.CONTRACT, f"info['success'] is {success!r}, wanted a bool"
    return Episode(
        id=spec.id,
        env=spec.env,
        task=spec.task,
        seed=spec.seed,
        turns=tuple(turns),
        stop=reason,
        success=success is True and not reason.aborted,
        error=error,
        task_type=info.get("task_type") or _last_task_type(turns),
        parent=spec.parent,
        final_observation=observation,
    )


def _last_task_type(turns: list[Turn]) -> str | None:
    return next((turn.info["task_type"] for turn in reversed(turns) if "task_type" in turn.info), None)
