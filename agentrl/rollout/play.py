"""The one episode loop. It does no input or output: it yields what it needs and is sent the answer.

Whoever drives it (one process, worker processes, Ray) decides where environments and models live; see
`collector`.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agentrl.data.trajectory import BranchPoint, Episode, StopReason, Turn
from agentrl.seeds import derive_seed

# Of `info` after a reply; `state_key` is of the state that was acted in.
STORED_INFO = ("success", "score", "valid", "task_type", "tool", "tool_error", "other_success")


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
    """An answer that ends the episode: a failure outside the policy, or a context that is full.

    `bystander` means that another episode's call brought it about.
    """

    reason: StopReason
    error: str | None = None
    bystander: bool = False


Effect = Reset | Step | ActionRequest
Answer = Transition | Reply | Stop
Wanted = TypeVar("Wanted", Transition, Reply)


def play(spec: EpisodeSpec, max_turns: int | None = None) -> Generator[Effect, Answer, Episode]:
    """Play one episode.

    Yields `Reset` and `Step` (answered by `Transition`) and `ActionRequest` (answered by `Reply`); any of
    them may be answered by `Stop`. Returns the episode, whatever happened: a failure is a value.
    """
    turns: list[Turn] = []
    seed = derive_seed("player", spec.seed, spec.id)
    before, task_type = Transition(""), None
    answer = yield Reset(spec.task, spec.seed)
    while True:
        if isinstance(answer, Stop):
            silent = Transition("", info=before.info)  # it said nothing after the last reply
            return _episode(spec, turns, answer.reason, silent, task_type, answer.error)
        before = _wanted(answer, Transition)
        task_type = before.info.get("task_type") or task_type
        if before.terminated or before.truncated:
            # Where a wrapper sets both flags, the environment's own verdict counts.
            reason = StopReason.TERMINATED if before.terminated else StopReason.TRUNCATED
            return _episode(spec, turns, reason, before, task_type)
        if max_turns is not None and len(turns) >= max_turns:
            return _episode(spec, turns, StopReason.TURN_LIMIT, before, task_type)
        actions = before.info.get("actions")
        actions = None if actions is None else tuple(actions)
        reply = yield ActionRequest(spec.id, len(turns), before.observation, actions, before.info, seed)
        if isinstance(reply, Stop):
            return _episode(spec, turns, reply.reason, before, task_type, reply.error)
        reply = _wanted(reply, Reply)
        answer = yield Step(reply.text)
        turns.append(_turn(before, reply, answer))


def _turn(before: Transition, reply: Reply, answer: Answer) -> Turn:
    after = answer if isinstance(answer, Transition) else Transition("")
    info = {key: after.info[key] for key in STORED_INFO if key in after.info}
    if "state_key" in before.info:
        info["state_key"] = before.info["state_key"]
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
        info=info,
    )


def _episode(
    spec: EpisodeSpec,
    turns: list[Turn],
    reason: StopReason,
    last: Transition,
    task_type: str | None,
    error: str | None = None,
) -> Episode:
    success = last.info.get("success")
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
        task_type=task_type,
        parent=spec.parent,
        final_observation=last.observation,
    )


def _wanted(answer: Answer, kind: type[Wanted]) -> Wanted:
    if not isinstance(answer, kind):
        raise TypeError(f"play was sent a {type(answer).__name__}, wanted a {kind.__name__} or a Stop")
    return answer
