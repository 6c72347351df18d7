"""Drives many episodes at once: who has an answer goes on, who has ended costs nothing."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

from agentrl.data.trajectory import Episode, StopReason
from agentrl.env.containment import signals
from agentrl.errors import TooManyAbortedError
from agentrl.rollout.branching import BranchScheduler, Start
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import ActionRequest, Answer, Effect, EpisodeSpec, Restore, Stop, play
from agentrl.rollout.players import Player

_RETRIED = (StopReason.ENV_ERROR, StopReason.WORKER_ERROR)
_MOST_ATTEMPTS = 10  # of an episode that only others' failures ended
_MOST_TURNS = 10_000  # of an episode that nothing else limits: an environment may have no end


@dataclass(frozen=True, slots=True)
class Collection:
    """What was played, and where the time went.

    Args:
        episodes: in the order of their specs; those of a scheduler by task, as they were started.
        failures: attempts that were aborted and made again; each is of an id that `episodes` holds as well.
        environment_seconds: that the collector spent in environments, or waiting for them.
        player_seconds: the same of the player.
        branches: how many episodes came to where they left another one: "restored" from a snapshot, or
            "replayed"; and how many "diverged" in the replay and were begun anew.
    """

    episodes: tuple[Episode, ...]
    failures: tuple[Episode, ...]
    environment_seconds: float
    player_seconds: float
    branches: Mapping[str, int] = field(default_factory=dict)


class Quarantine:
    """Tasks that failed several times in a row, in whatever episode, and are not tried any more.

    Args:
        after: so many failures; None never.
    """

    def __init__(self, after: int | None = None) -> None:
        self._after = after
        self._failures: Counter[str] = Counter()
        self.tasks: dict[str, str] = {}  # why

    def add(self, task: str, reason: str) -> None:
        """Count a failure."""
        self._failures[task] += 1
        if self._after is not None and self._failures[task] >= self._after:
            self.tasks[task] = f"quarantined after {self._after} failures in a row, the last: {reason}"

    def clear(self, task: str) -> None:
        """The task was played to its end."""
        self._failures.pop(task, None)


def collect(
    specs: Sequence[EpisodeSpec],
    player: Player,
    environments: Environments,
    *,
    max_active: int,
    max_turns: int | None = None,
    max_attempts: int = 1,
    max_aborted_share: float = 1.0,
    quarantine: Quarantine | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    scheduler: BranchScheduler | None = None,
) -> Collection:
    """Play episodes to their end, at most `max_active` at a time.

    An episode asks for its next reply as soon as its environment has answered, and a new one starts as soon
    as one ends. What an environment does wrong ends its episode as aborted and concerns no other.

    Args:
        specs: what to play; ids must differ.
        player: who replies.
        environments: where. Each is used by one episode at a time, and thrown away after an error.
        max_active: episodes at a time; `environments` may have fewer places.
        max_turns: limit on replies beside the environment's own; None for 10,000.
        max_attempts: plays of an episode in which the environment or its worker fails. A play that ended only
            because another one took the worker down does not count.
        max_aborted_share: of the episodes.
        quarantine: tasks not to be tried, and where failures are counted; None starts with none, and puts no
            task there.
        on_episode: called with each episode as it ends for good.
        scheduler: starts further episodes while these are played, some from the middle of others. An episode
            that others have left is not played again when it fails: they hold what it had come to.

    Returns:
        The episodes in the order of `specs`, each once, and then the scheduler's.

    Raises:
        AgentRLError: an environment could not be made, for a reason that its user can mend.
        TooManyAbortedError: as soon as the share must come out larger than allowed.
        RuntimeError: someone else closed the environments.
        BaseException: what `player` and `on_episode` raise, and interrupts; environments are closed first.
    """
    if max_active < 1:
        raise ValueError(f"max_active is {max_active}, wanted at least 1")
    if len({spec.id for spec in specs}) != len(specs):
        raise ValueError("two of the episode specs have the same id")
    scheduler = scheduler or BranchScheduler((), (), episodes=1)
    drive = _Drive(
        player,
        environments,
        _MOST_TURNS if max_turns is None else max_turns,
        max_attempts,
        max_aborted_share * (len(specs) + scheduler.total),
        quarantine or Quarantine(),
        on_episode,
        scheduler,
    )
    try:
        with signals:
            return drive.run(specs, min(max_active, environments.capacity or max_active))
    except BaseException:
        environments.close()
        for episode_id in [*drive.active, *drive.leaving]:
            with suppress(Exception):  # what is on its way up matters more
                player.close(episode_id)
        raise


@dataclass(slots=True)
class _Running:
    start: Start
    attempt: int
    loop: Generator[Effect, Answer, Episode]
    thinking: bool = False  # whether the player owes a reply
    bystander: bool = False
    restoring: bool = False

    @property
    def spec(self) -> EpisodeSpec:
        return self.start.spec


@dataclass(slots=True)
class _Drive:
    player: Player
    environments: Environments
    max_turns: int
    max_attempts: int
    max_aborted: float
    quarantine: Quarantine
    on_episode: Callable[[Episode], None] | None
    scheduler: BranchScheduler
    waiting: deque[tuple[Start, int]] = field(default_factory=deque)
    active: dict[str, _Running] = field(default_factory=dict)
    finished: dict[str, Episode] = field(default_factory=dict)
    failures: list[Episode] = field(default_factory=list)
    blameless: Counter[str] = field(default_factory=Counter)  # attempts that others ended
    heirs: dict[str, str] = field(default_factory=dict)  # by who has yet to take over tokens: from whom
    leaving: set[str] = field(default_factory=set)  # have ended, and the player knows them for their heirs
    branches: Counter[str] = field(default_factory=Counter)
    thinking: int = 0
    environment_seconds: float = 0.0
    player_seconds: float = 0.0

    def run(self, specs: Sequence[EpisodeSpec], max_active: int) -> Collection:
        self.waiting.extend((Start(spec), 1) for spec in specs)
        self._line_up(self.scheduler.begin())
        while True:
            while self.waiting and len(self.active) < max_active:
                self._start(*self.waiting.popleft())
            if not self.active:
                break
            # Environments first: the more episodes want a reply, the better the player's batches.
            if self._environments_answer():
                continue
            if not self.thinking:
                raise RuntimeError("the environments were closed while episodes were played in them")
            self._player_answers()
        ids = [*(spec.id for spec in specs), *self.scheduler.ids]
        return Collection(
            tuple(self.finished[name] for name in ids),
            tuple(self.failures),
            self.environment_seconds,
            self.player_seconds,
            {name: self.branches[name] for name in ("restored", "replayed", "diverged")},
        )

    def _environments_answer(self) -> bool:
        began = perf_counter()
        answers = self.environments.poll(wait=not self.thinking)
        self.environment_seconds += perf_counter() - began
        for episode_id, answer in answers:
            running = self.active[episode_id]
            running.bystander = isinstance(answer, Stop) and answer.bystander
            if running.restoring and isinstance(answer, Stop):
                self.environments.release(episode_id, broken=True)  # its actions are played again elsewhere
            self._advance(running, answer)
        return bool(answers)

    def _player_answers(self) -> None:
        began = perf_counter()
        answers = self.player.poll()
        self.player_seconds += perf_counter() - began
        for episode_id, answer in answers:
            if episode_id not in self.active or not self.active[episode_id].thinking:
                raise ValueError(f"the player replied for {episode_id!r}, which did not ask")
            self.active[episode_id].thinking = False
            self.thinking -= 1
            self.active[episode_id].bystander = isinstance(answer, Stop) and answer.bystander
            self._advance(self.active[episode_id], answer)

    def _line_up(self, starts: Sequence[Start]) -> None:
        """Let episodes begin before those that wait already: what they take over is soon not needed."""
        self.waiting.extendleft((start, 1) for start in reversed(starts))
        for start in starts:
            if start.fork is not None and start.spec.parent is not None:
                self.heirs[start.spec.id] = start.spec.parent.parent

    def _start(self, start: Start, attempt: int) -> None:
        reason = self.quarantine.tasks.get(start.spec.task)
        fork = start.fork if reason is None else None
        loop = play(start.spec, self.max_turns, fork=fork, path=start.path)
        running = self.active[start.spec.id] = _Running(start, attempt, loop)
        effect = next(loop)
        if reason is not None:
            running.attempt = self.max_attempts
            self._advance(running, Stop(StopReason.WORKER_ERROR, reason))
        else:
            self._handle(running, effect)

    def _advance(self, running: _Running, answer: Answer) -> None:
        try:
            effect = running.loop.send(answer)
        except StopIteration as end:
            self._end(running, end.value)
        else:
            self._handle(running, effect)

    def _handle(self, running: _Running, effect: Effect) -> None:
        running.restoring = isinstance(effect, Restore)
        if isinstance(effect, ActionRequest):
            self._branch(running, effect.turn)
            began = perf_counter()
            self.player.submit(effect)
            self.player_seconds += perf_counter() - began
            running.thinking = True
            self.thinking += 1
            self._inherited(running.spec.id)
        else:
            self.environments.submit(running.spec.id, effect)

    def _branch(self, running: _Running, turn: int) -> None:
        """Before a reply: let the episode take over what it inherits, and others leave it."""
        name, fork, path = running.spec.id, running.start.fork, running.start.path
        if turn > path.inherited:
            self._line_up(self.scheduler.reached(name))
        elif fork is not None and path.parent is not None and path.branching != "diverged":
            began = perf_counter()
            self.player.fork(name, path.parent.parent, fork.turns, fork.prefix_ids)
            self.player_seconds += perf_counter() - began

    def _inherited(self, name: str) -> None:
        """An episode takes over nothing any more; who has ended and is left by nobody can be forgotten."""
        self.heirs.pop(name, None)
        for parent in sorted(self.leaving - set(self.heirs.values())):
            self.leaving.remove(parent)
            self.player.close(parent)

    def _end(self, running: _Running, episode: Episode) -> None:
        del self.active[episode.id]
        self.environments.release(episode.id, broken=episode.stop.aborted)
        if (running.bystander or episode.stop in _RETRIED) and self._try_again(running, episode):
            self.player.close(episode.id)
            self.failures.append(episode)
            return
        self._line_up(self.scheduler.ended(episode))
        self.leaving.add(episode.id)
        self._inherited(episode.id)
        if running.start.path.branching is not None:
            self.branches[running.start.path.branching] += 1
        if not episode.stop.aborted:
            self.quarantine.clear(episode.task)
        self.finished[episode.id] = episode
        if self.on_episode is not None:
            self.on_episode(episode)
        if episode.stop.aborted:
            self._refuse_too_many()

    def _try_again(self, running: _Running, episode: Episode) -> bool:
        spec = running.spec
        if running.bystander:
            self.blameless[spec.id] += 1
            again = running.attempt
        elif spec.task in self.quarantine.tasks:
            return False
        else:
            self.quarantine.add(spec.task, episode.error or "")
            again = running.attempt + 1
        if again > self.max_attempts or self.blameless[spec.id] >= _MOST_ATTEMPTS:
            return False
        if self.scheduler.branched(spec.id):
            return False
        running.start.path.begin(spec.parent)  # what failed is not there to be left
        self.waiting.append((running.start, again))
        return True

    def _refuse_too_many(self) -> None:
        aborted = [episode for episode in self.finished.values() if episode.stop.aborted]
        if len(aborted) > self.max_aborted:
            raise TooManyAbortedError(
                f"{len(aborted)} episodes were aborted, more than {self.max_aborted:g} allowed:\n"
                + "\n".join(f"{count} x {reason}" for reason, count in abort_reasons(aborted, 3))
            )


def abort_reasons(episodes: Sequence[Episode], most: int | None = None) -> list[tuple[str, int]]:
    """Why episodes were aborted and how often, the most frequent reason first."""
    aborted = [episode for episode in episodes if episode.stop.aborted]
    return Counter(
        f"{episode.stop.value}: {episode.error}" if episode.error else episode.stop.value
        for episode in aborted
    ).most_common(most)
