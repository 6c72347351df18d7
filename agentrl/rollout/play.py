"""The episode loop: a generator without input or output, which yields requests and is sent their answers.

The code that drives it (see `collector`) decides where environments and models live.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from agentrl.data.trajectory import BranchPoint, Episode, StopReason, Turn
from agentrl.env.briefing import Briefing
from agentrl.errors import EnvironmentContractError
from agentrl.seeds import derive_seed
from agentrl.values import ValueFaultError, as_text, storable

# Keys of `info` that a turn keeps from the answer to its reply, and from the state before it.
STORED_INFO = ("success", "score", "valid", "task_type", "tool", "tool_error", "other_success")
INFO_BEFORE = ("state_key", "task_text", "paraphrase")


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """An episode to be played.

    The members of a group can share `seed`, and with it their first state, and still differ, since the seed
    of the player is derived from `seed` and `id`.

    Args:
        id: The unique name of the episode.
        env: The id of the environment.
        task: The id of the task.
        seed: The seed of the environment.
        parent: The point of another episode from which this one branches; None for the first observation.
        member: The index of the episode in its group.
    """

    id: str
    env: str
    task: str
    seed: int
    parent: BranchPoint | None = None
    member: int = 0

    def __post_init__(self) -> None:
        try:
            as_text(self.task)
        except ValueFaultError as fault:
            raise EnvironmentContractError(f"{self.env}: the id of a task {fault}") from fault


@dataclass(frozen=True, slots=True)
class Reset:
    """Request for the first observation of a task; with `keep`, for a snapshot as well."""

    task: str
    seed: int
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """Request for the environment's answer to an action; with `keep`, for a snapshot as well."""

    action: str
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Request to continue from a `Transition.snapshot`; the answer is empty, as the observation is known."""

    snapshot: Any


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """Request for a reply of the player.

    Args:
        episode_id: The id of the episode.
        turn: The index of the turn, from 0.
        observation: The observation to reply to.
        actions: The admissible actions; None if the environment does not name them.
        info: The complete `info` that came with the observation.
        seed: The seed of the episode's random draws.
        task: The id of the task.
        member: The index of the episode in its group.
        previous: The turn before this one; None in the first.
        briefing: What the environment told at the start of the episode.
        attempt: The number of replies at this turn that the gate has refused.
    """

    episode_id: str
    turn: int
    observation: str
    actions: tuple[str, ...] | None
    info: Mapping[str, Any]
    seed: int
    task: str = ""
    member: int = 0
    previous: Turn | None = None
    briefing: Briefing = field(default_factory=Briefing)
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Transition:
    """The environment's answer to `Reset` (with reward 0 and no end) or `Step`.

    `snapshot` restores this state in the environments that made it; None if it was not requested or is not
    available. `briefing` comes with a reset.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    snapshot: Any = field(default=None, repr=False, compare=False)
    briefing: Briefing = field(default_factory=Briefing, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """The player's answer; the token fields are those of `Turn`, and empty for players without tokens."""

    text: str
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    allowed: tuple[tuple[int, ...] | None, ...] | None = None
    new_sequence: bool = False
    valid: bool = True
    trainable: bool = True
    finish: str = "stop"
    policy_version: int = 0
    policy_versions: tuple[int, ...] = ()
    temperature: float | None = None
    temperatures: tuple[float, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)  # of a reply that plans; kept in `Turn.info`
    confidences: tuple[float, ...] = ()
    intervened: bool = False

    @property
    def decided(self) -> tuple[bool, ...]:
        """Return for each reply token whether it was a decision, as `Turn.action_mask` does."""
        if self.allowed is None:
            return (True,) * len(self.action_ids)
        return tuple(ids is None or len(ids) > 1 for ids in self.allowed)


@dataclass(frozen=True, slots=True)
class Stop:
    """An answer that ends the episode: a failure outside the policy, or a full context.

    Args:
        reason: The reason why the episode ends.
        error: The error message, if any.
        bystander: Whether the episode did not cause it, as when a call of another episode killed the worker.
    """

    reason: StopReason
    error: str | None = None
    bystander: bool = False

    def __post_init__(self) -> None:
        if self.error is not None:  # messages of environments are stored, so they must be valid text
            object.__setattr__(self, "error", storable(self.error))


@dataclass(frozen=True, slots=True)
class Gate:
    """Test that a reply passes before the environment gets it.

    Args:
        judge: (request, reply) -> whether it does, and a number to keep of it.
        resamples: The maximum number of refused replies of a turn.
    """

    judge: Callable[[ActionRequest, Reply], tuple[bool, float]]
    resamples: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The state in which an episode branches from its parent: before turn `len(turns)`.

    Args:
        turns: The turns of the parent up to that state, which are the first turns of the child.
        transitions: The first observation of the parent, and the answer to each of `turns`.
        prefix_ids: The first tokens of the parent's next reply, with which the child's reply begins.
    """

    turns: tuple[Turn, ...]
    transitions: tuple[Transition, ...]
    prefix_ids: tuple[int, ...] = ()


Branching = Literal["restored", "replayed", "diverged"]


@dataclass(slots=True)
class Path:
    """The progress of an episode: `play` records it, and other episodes may branch from any state on it.

    Args:
        keep: Whether to request a snapshot of every state.
        parent: The point at which the episode in fact branched from its parent.
        branching: How that point was reached; `diverged` if it was not and the episode was started anew. None
            for an episode that has not branched.
        inherited: The number of `turns` that are the parent's.
        turns: The turns so far.
        transitions: The first observation, and the environment's answer to each of `turns`.
    """

    keep: bool = False
    parent: BranchPoint | None = None
    branching: Branching | None = None
    inherited: int = 0
    turns: list[Turn] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)

    def begin(self, parent: BranchPoint | None, branching: Branching | None = None) -> None:
        """Clear the path for a new attempt."""
        self.parent, self.branching, self.inherited = parent, branching, 0
        self.turns.clear()
        self.transitions.clear()

    def inherit(self, turns: Sequence[Turn], transitions: Sequence[Transition], branching: Branching) -> None:
        """Copy the turns and transitions of the parent up to the branch point."""
        self.branching, self.inherited = branching, len(turns)
        self.turns[:], self.transitions[:] = turns, transitions


@dataclass(frozen=True, slots=True)
class Collection:
    """The episodes of a collection, and where its time went.

    Args:
        episodes: The episodes in the order of their specs; those of a scheduler by task, as they were
            started.
        failures: The aborted attempts that were made again; `episodes` holds an episode of the same id.
        environment_seconds: The time spent waiting for environments, or running them.
        player_seconds: The time spent in the player.
        branches: The number of episodes that reached their branch point, "restored" from a snapshot or
            "replayed", and of those that "diverged" in the replay and were started anew.
    """

    episodes: tuple[Episode, ...]
    failures: tuple[Episode, ...]
    environment_seconds: float
    player_seconds: float
    branches: Mapping[str, int] = field(default_factory=dict)


EnvironmentCall = Reset | Step | Restore
Effect = EnvironmentCall | ActionRequest
Answer = Transition | Reply | Stop
AnswerT = TypeVar("AnswerT", Transition, Reply)


def play(
    spec: EpisodeSpec,
    max_turns: int | None = None,
    *,
    fork: Fork | None = None,
    path: Path | None = None,
    gate: Gate | None = None,
) -> Generator[Effect, Answer, Episode]:
    """Play one episode.

    Args:
        spec: The episode to play.
        max_turns: The maximum number of replies, beside the environment's own limit; those of a parent count.
        fork: The state in which the episode branches from its parent, `spec.parent`. A snapshot is restored
            if there is one, else the parent's actions are replayed; if the environment answers differently,
            the episode starts anew and shares only the first state with its parent.
        path: A record of the progress, written during the episode.
        gate: What decides whether a reply is given to the environment; None lets all of them pass.

    Yields:
        `Reset`, `Step` and `Restore`, answered by a `Transition`, and `ActionRequest`, answered by a `Reply`.
        Any of them may be answered by a `Stop`.

    Returns:
        The episode; one that failed has a stop reason that says so.
    """
    path = Path() if path is None else path
    path.begin(spec.parent)
    seed = derive_seed("player", spec.seed, spec.id)
    answer = yield from _open(spec, fork, path)
    while True:
        if isinstance(answer, Stop):
            known = path.transitions[-1].info if path.transitions else {}
            last = Transition("", info=known)  # no observation followed the last reply
            return _episode(spec, path, answer.reason, last, answer.error)
        before = _checked(answer, Transition)
        path.transitions.append(before)
        if before.terminated or before.truncated:
            # A time limit wrapper may set both flags; the environment's own one takes precedence.
            reason = StopReason.TERMINATED if before.terminated else StopReason.TRUNCATED
            return _episode(spec, path, reason, before)
        if max_turns is not None and len(path.turns) >= max_turns:
            return _episode(spec, path, StopReason.TURN_LIMIT, before)
        turn, actions = len(path.turns), _actions(before)
        request = ActionRequest(
            spec.id,
            turn,
            before.observation,
            actions,
            before.info,
            seed,
            task=spec.task,
            member=spec.member,
            previous=path.turns[-1] if path.turns else None,
            briefing=_limited(path.transitions[0].briefing, max_turns),
        )
        reply, noted = yield from _reply(request, gate)
        if isinstance(reply, Stop):
            return _episode(spec, path, reply.reason, before, reply.error)
        answer = yield Step(reply.text, path.keep)
        path.turns.append(_turn(before, reply, answer, noted))


def _reply(
    request: ActionRequest, gate: Gate | None
) -> Generator[Effect, Answer, tuple[Reply | Stop, dict[str, Any]]]:
    """Ask for replies until the gate accepts one; return it with what is to be noted of those before."""
    answer = yield request
    if isinstance(answer, Stop) or gate is None:
        return answer if isinstance(answer, Stop) else _checked(answer, Reply), {}
    refused = tokens = 0
    while True:
        reply = _checked(answer, Reply)
        accepted, score = gate.judge(request, reply)
        if accepted or refused == gate.resamples:
            counts = {"discarded_replies": refused, "discarded_tokens": tokens} if refused else {}
            return reply, {"gate_score": score, **counts}
        refused, tokens = refused + 1, tokens + len(reply.action_ids)
        answer = yield replace(request, attempt=refused)
        if isinstance(answer, Stop):
            return answer, {}


def _open(spec: EpisodeSpec, fork: Fork | None, path: Path) -> Generator[Effect, Answer, Answer]:
    """Bring the environment to the state of the first reply, and return its answer there."""
    if fork is None:
        return (yield Reset(spec.task, spec.seed, path.keep))
    *earlier, branch_state = fork.transitions
    if branch_state.snapshot is not None:
        answer = yield Restore(branch_state.snapshot)
        if not isinstance(answer, Stop):  # else the actions are replayed
            path.inherit(fork.turns, earlier, "restored")
            return branch_state
    answer = yield Reset(spec.task, spec.seed, path.keep)
    for turn, recorded in zip(fork.turns, earlier, strict=True):
        if not _repeats(answer, recorded):
            break
        path.transitions.append(_checked(answer, Transition))
        answer = yield Step(turn.action, path.keep)
        path.turns.append(turn)
    if isinstance(answer, Stop):
        return answer
    if len(path.turns) == len(fork.turns) and _repeats(answer, branch_state):
        path.inherit(fork.turns, list(path.transitions), "replayed")
        return answer
    # The environment is not deterministic: what it answered so far is dropped.
    path.begin(spec.parent and BranchPoint(spec.parent.parent, 0), "diverged")
    return (yield Reset(spec.task, spec.seed, path.keep))


def _repeats(answer: Answer, recorded: Transition) -> bool:
    """Return whether an answer equals a recorded one in all that a policy can see."""
    if isinstance(answer, Stop):
        return False
    return _visible_part(_checked(answer, Transition)) == _visible_part(recorded)


def _visible_part(answer: Transition) -> tuple[object, ...]:
    return answer.observation, answer.terminated, answer.truncated, _actions(answer)


def _actions(answer: Transition) -> tuple[str, ...] | None:
    actions = answer.info.get("actions")
    return None if actions is None else tuple(actions)


def _limited(briefing: Briefing, max_turns: int | None) -> Briefing:
    """Return a briefing whose step limit is that of the episode, if it is the smaller one."""
    known = briefing.max_steps
    if max_turns is None or (known is not None and known <= max_turns):
        return briefing
    return replace(briefing, max_steps=max_turns)


def _turn(before: Transition, reply: Reply, answer: Answer, noted: Mapping[str, Any]) -> Turn:
    after = answer if isinstance(answer, Transition) else Transition("")
    info = {key: after.info[key] for key in STORED_INFO if key in after.info}
    info |= {key: before.info[key] for key in INFO_BEFORE if key in before.info}
    if (offered := _actions(before)) is not None:
        info["choices"] = len(offered)
    if reply.parts:
        info["parts"] = dict(reply.parts)
    if reply.intervened:
        info["intervened"] = True
    info |= noted
    return Turn(
        observation=before.observation,
        action=reply.text,
        prompt_ids=reply.prompt_ids,
        action_ids=reply.action_ids,
        logprobs=reply.logprobs,
        entropies=reply.entropies,
        allowed=reply.allowed,
        reward=after.reward,
        new_sequence=reply.new_sequence,
        valid=reply.valid and bool(after.info.get("valid", True)),
        trainable=reply.trainable,
        finish=reply.finish,
        policy_version=reply.policy_version,
        policy_versions=reply.policy_versions,
        temperature=reply.temperature,
        temperatures=reply.temperatures,
        info=info,
    )


def _episode(
    spec: EpisodeSpec, path: Path, reason: StopReason, last: Transition, error: str | None = None
) -> Episode:
    success = last.info.get("success")
    if not reason.aborted and not isinstance(success, bool):
        reason, error = StopReason.CONTRACT, f"info['success'] is {success!r}, wanted a bool"
    task_types = (answer.info.get("task_type") for answer in reversed(path.transitions))
    return Episode(
        id=spec.id,
        env=spec.env,
        task=spec.task,
        seed=spec.seed,
        turns=tuple(path.turns),
        stop=reason,
        success=success is True and not reason.aborted,
        error=error,
        task_type=next(filter(None, task_types), None),
        parent=path.parent,
        final_observation=last.observation,
    )


def _checked(answer: Answer, kind: type[AnswerT]) -> AnswerT:
    if not isinstance(answer, kind):
        raise TypeError(f"play was sent a {type(answer).__name__}, wanted a {kind.__name__} or a Stop")
    return answer
