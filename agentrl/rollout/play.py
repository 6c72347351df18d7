"""The one episode loop. It does no input or output: it yields what it needs and is sent the answer.

Whoever drives it (one process, worker processes, Ray) decides where environments and models live; see
`collector`.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from agentrl.data.trajectory import BranchPoint, Episode, StopReason, Turn
from agentrl.errors import EnvironmentContractError
from agentrl.seeds import derive_seed
from agentrl.values import ValueFaultError, as_text, storable

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

    def __post_init__(self) -> None:
        try:
            as_text(self.task)
        except ValueFaultError as fault:
            raise EnvironmentContractError(f"{self.env}: the id of a task {fault}") from fault


@dataclass(frozen=True, slots=True)
class Reset:
    """Ask for the first observation of a task; with `keep`, for a snapshot as well."""

    task: str
    seed: int
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """Ask the environment for its answer to an action; with `keep`, for a snapshot as well."""

    action: str
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Ask to go on from a `Transition.snapshot`. What is observed there is known: the answer is empty."""

    snapshot: Any


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
    """The environment's answer to `Reset` (reward 0, no end) or `Step`.

    `snapshot` goes back to this state when given to the environments that made it; None where it was not
    asked for or cannot be had.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    snapshot: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """The player's answer; the token fields are those of `Turn`, empty for players without tokens."""

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


@dataclass(frozen=True, slots=True)
class Stop:
    """An answer that ends the episode: a failure outside the policy, or a context that is full.

    `bystander` means that the episode had no part in it, as when another one's call brought it about.
    """

    reason: StopReason
    error: str | None = None
    bystander: bool = False

    def __post_init__(self) -> None:
        if self.error is not None:  # it may be somebody else's, and is stored
            object.__setattr__(self, "error", storable(self.error))


@dataclass(frozen=True, slots=True)
class Fork:
    """Where an episode leaves another one, its parent: in the state before turn `len(turns)`.

    Args:
        turns: the parent's until there; they are the child's first.
        transitions: the parent's first observation and the answer to each of `turns`.
        prefix_ids: tokens with which the parent's next reply began, and the child's begins.
    """

    turns: tuple[Turn, ...]
    transitions: tuple[Transition, ...]
    prefix_ids: tuple[int, ...] = ()


Branching = Literal["restored", "replayed", "diverged"]


@dataclass(slots=True)
class Path:
    """How far an episode has come: `play` writes it, and others may leave the episode from any place on it.

    Args:
        keep: whether to ask for a snapshot of every state.
        parent: where the episode left another one, as it turned out.
        branching: how it came to that place; `diverged` if it did not, and was begun anew. None without one.
        inherited: how many of `turns` are the parent's.
        turns: so far.
        transitions: the first observation, and the environment's answer to each of `turns`.
    """

    keep: bool = False
    parent: BranchPoint | None = None
    branching: Branching | None = None
    inherited: int = 0
    turns: list[Turn] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)

    def begin(self, parent: BranchPoint | None, branching: Branching | None = None) -> None:
        """Go back to where nothing has been played."""
        self.parent, self.branching, self.inherited = parent, branching, 0
        self.turns.clear()
        self.transitions.clear()

    def inherit(self, turns: Sequence[Turn], transitions: Sequence[Transition], branching: Branching) -> None:
        """Take over how a parent came to the place where it is left."""
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
Wanted = TypeVar("Wanted", Transition, Reply)


def play(
    spec: EpisodeSpec, max_turns: int | None = None, *, fork: Fork | None = None, path: Path | None = None
) -> Generator[Effect, Answer, Episode]:
    """Play one episode.

    Yields `Reset`, `Step` and `Restore` (answered by `Transition`) and `ActionRequest` (answered by `Reply`);
    any of them may be answered by `Stop`. Returns the episode, whatever happened: a failure is a value.

    Args:
        spec: what is played.
        max_turns: limit on replies beside the environment's own; those of a parent count.
        fork: where the episode leaves its parent, `spec.parent`. A snapshot is restored if there is one, else
            the parent's actions are played again; where the environment answers them otherwise, the episode
            is begun anew and shares nothing with its parent but the start.
        path: written while the episode is played.
    """
    path = Path() if path is None else path
    path.begin(spec.parent)
    seed = derive_seed("player", spec.seed, spec.id)
    answer = yield from _opening(spec, fork, path)
    while True:
        if isinstance(answer, Stop):
            known = path.transitions[-1].info if path.transitions else {}
            silent = Transition("", info=known)  # it said nothing after the last reply
            return _episode(spec, path, answer.reason, silent, answer.error)
        before = _wanted(answer, Transition)
        path.transitions.append(before)
        if before.terminated or before.truncated:
            # Where a wrapper sets both flags, the environment's own verdict counts.
            reason = StopReason.TERMINATED if before.terminated else StopReason.TRUNCATED
            return _episode(spec, path, reason, before)
        if max_turns is not None and len(path.turns) >= max_turns:
            return _episode(spec, path, StopReason.TURN_LIMIT, before)
        turn, actions = len(path.turns), _actions(before)
        reply = yield ActionRequest(spec.id, turn, before.observation, actions, before.info, seed)
        if isinstance(reply, Stop):
            return _episode(spec, path, reply.reason, before, reply.error)
        reply = _wanted(reply, Reply)
        answer = yield Step(reply.text, path.keep)
        path.turns.append(_turn(before, reply, answer))


def _opening(spec: EpisodeSpec, fork: Fork | None, path: Path) -> Generator[Effect, Answer, Answer]:
    """Come to the state of the first reply; returns what the environment answered there."""
    if fork is None:
        return (yield Reset(spec.task, spec.seed, path.keep))
    *earlier, there = fork.transitions
    if there.snapshot is not None:
        answer = yield Restore(there.snapshot)
        if not isinstance(answer, Stop):
            path.inherit(fork.turns, earlier, "restored")
            return there
    answer = yield Reset(spec.task, spec.seed, path.keep)
    for turn, recorded in zip(fork.turns, earlier, strict=True):
        if not _repeats(answer, recorded):
            break
        path.transitions.append(_wanted(answer, Transition))
        answer = yield Step(turn.action, path.keep)
        path.turns.append(turn)
    if isinstance(answer, Stop):
        return answer
    if len(path.turns) == len(fork.turns) and _repeats(answer, there):
        path.inherit(fork.turns, list(path.transitions), "replayed")
        return answer
    path.begin(spec.parent and BranchPoint(spec.parent.parent, 0), "diverged")
    return (yield Reset(spec.task, spec.seed, path.keep))


def _repeats(answer: Answer, recorded: Transition) -> bool:
    """Whether an environment says again what was recorded, as far as a policy can tell."""
    return not isinstance(answer, Stop) and _told(_wanted(answer, Transition)) == _told(recorded)


def _told(answer: Transition) -> tuple[object, ...]:
    return answer.observation, answer.terminated, answer.truncated, _actions(answer)


def _actions(answer: Transition) -> tuple[str, ...] | None:
    actions = answer.info.get("actions")
    return None if actions is None else tuple(actions)


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
        new_sequence=reply.new_sequence,
        valid=reply.valid and bool(after.info.get("valid", True)),
        trainable=reply.trainable,
        finish=reply.finish,
        policy_version=reply.policy_version,
        policy_versions=reply.policy_versions,
        info=info,
    )


def _episode(
    spec: EpisodeSpec, path: Path, reason: StopReason, last: Transition, error: str | None = None
) -> Episode:
    success = last.info.get("success")
    if not reason.aborted and not isinstance(success, bool):
        reason, error = StopReason.CONTRACT, f"info['success'] is {success!r}, wanted a bool"
    named = (answer.info.get("task_type") for answer in reversed(path.transitions))
    return Episode(
        id=spec.id,
        env=spec.env,
        task=spec.task,
        seed=spec.seed,
        turns=tuple(path.turns),
        stop=reason,
        success=success is True and not reason.aborted,
        error=error,
        task_type=next(filter(None, named), None),
        parent=path.parent,
        final_observation=last.observation,
    )


def _wanted(answer: Answer, kind: type[Wanted]) -> Wanted:
    if not isinstance(answer, kind):
        raise TypeError(f"play was sent a {type(answer).__name__}, wanted a {kind.__name__} or a Stop")
    return answer
