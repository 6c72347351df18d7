"""Playing many episodes at once: each one continues as soon as it has the answer that it waits for."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter

from agentrl.data.trajectory import Episode, StopReason
from agentrl.env.containment import signals
from agentrl.rollout.branching import BranchScheduler, RetainedParents, Start
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import Quarantine, Retries, check_aborted
from agentrl.rollout.play import (
    ActionRequest,
    Answer,
    Collection,
    Effect,
    EpisodeSpec,
    Gate,
    Restore,
    Stop,
    play,
)
from agentrl.rollout.players import Player

_MAX_TURNS = 10_000  # of an episode without another limit: an environment may never end one


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
    gate: Gate | None = None,
) -> Collection:
    """Play episodes to their end, at most `max_active` at a time.

    An episode asks for its next reply as soon as its environment has answered, and a new episode starts as
    soon as one ends. An error in an environment aborts its episode and affects no other.

    Args:
        specs: The episodes to play; their ids must differ.
        player: The player that replies.
        environments: The environments to play in. Each is used by one episode at a time, and discarded after
            an error.
        max_active: The maximum number of episodes in progress; the capacity of `environments` may be smaller.
        max_turns: The maximum number of replies in an episode, beside the environment's own limit; None for
            10,000.
        max_attempts: The number of attempts at an episode in which the environment or its worker fails. An
            attempt that ended only because another episode took the worker down does not count.
        max_aborted_share: The largest allowed share of aborted episodes.
        quarantine: The tasks that are not played, and the counter of failures; None starts with no such task
            and adds none.
        on_episode: A function that is called with each episode when it ends and is not played again.
        scheduler: The scheduler that starts further episodes during the collection, some from the middle of
            others. A failed episode from which others have branched is not played again, since they hold its
            turns.
        gate: What decides whether a reply is given to its environment. A refused one is forgotten, and the
            player is asked again.

    Returns:
        The episodes in the order of `specs`, each once, and then those of the scheduler.

    Raises:
        AgentRLError: An environment cannot be made, for a reason that its user can fix.
        TooManyAbortedError: The share of aborted episodes is bound to be larger than allowed.
        RuntimeError: The environments were closed during the collection.
        BaseException: An error from `player` or `on_episode`, or an interrupt; the environments are closed
            first.
    """
    if max_active < 1:
        raise ValueError(f"max_active is {max_active}, wanted at least 1")
    if len({spec.id for spec in specs}) != len(specs):
        raise ValueError("two of the episode specs have the same id")
    scheduler = scheduler or BranchScheduler((), (), episodes=1)
    quarantine = quarantine or Quarantine()
    collector = _Collector(
        player=player,
        environments=environments,
        scheduler=scheduler,
        quarantine=quarantine,
        retries=Retries(max_attempts, quarantine),
        max_turns=_MAX_TURNS if max_turns is None else max_turns,
        max_aborted=max_aborted_share * (len(specs) + scheduler.total),
        on_episode=on_episode,
        gate=gate,
    )
    try:
        with signals:
            return collector.run(specs, min(max_active, environments.capacity or max_active))
    except BaseException:
        environments.close()
        for episode_id in [*collector.active, *collector.parents.retained_parents]:
            with suppress(Exception):  # must not replace the error that ended the collection
                player.close(episode_id)
        raise


@dataclass(slots=True)
class _Stopwatch:
    """Sum of the seconds spent in a block of code."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds += perf_counter() - began


@dataclass(slots=True)
class _Running:
    """One attempt at an episode, in progress."""

    start: Start
    attempt: int
    loop: Generator[Effect, Answer, Episode]
    awaits_reply: bool = False
    restoring: bool = False
    bystander: bool = False  # whether the last answer was a failure elsewhere

    @property
    def id(self) -> str:
        return self.start.spec.id


@dataclass(slots=True)
class _Collector:
    """Loop that passes effects and answers between episodes, their environments and the player."""

    player: Player
    environments: Environments
    scheduler: BranchScheduler
    quarantine: Quarantine
    retries: Retries
    max_turns: int
    max_aborted: float
    on_episode: Callable[[Episode], None] | None
    gate: Gate | None
    waiting: deque[tuple[Start, int]] = field(default_factory=deque)  # with the number of the attempt
    active: dict[str, _Running] = field(default_factory=dict)
    finished: dict[str, Episode] = field(default_factory=dict)
    failures: list[Episode] = field(default_factory=list)
    parents: RetainedParents = field(default_factory=RetainedParents)
    branches: Counter[str] = field(default_factory=Counter)
    replies_pending: int = 0
    environment_time: _Stopwatch = field(default_factory=_Stopwatch)
    player_time: _Stopwatch = field(default_factory=_Stopwatch)

    def run(self, specs: Sequence[EpisodeSpec], max_active: int) -> Collection:
        self.waiting.extend((Start(spec), 1) for spec in specs)
        self._schedule(self.scheduler.begin())
        while True:
            while self.waiting and len(self.active) < max_active:
                self._start(*self.waiting.popleft())
            if not self.active:
                break
            # Environments first: the more episodes want a reply, the larger the player's batches.
            if self._process_environments():
                continue
            if not self.replies_pending:
                raise RuntimeError("the environments were closed while episodes were played in them")
            self._process_replies()
        ids = [*(spec.id for spec in specs), *self.scheduler.ids]
        return Collection(
            episodes=tuple(self.finished[episode_id] for episode_id in ids),
            failures=tuple(self.failures),
            environment_seconds=self.environment_time.seconds,
            player_seconds=self.player_time.seconds,
            branches={how: self.branches[how] for how in ("restored", "replayed", "diverged")},
        )

    def _schedule(self, starts: Sequence[Start]) -> None:
        """Put the scheduler's episodes first, so that their parents need not be kept for long."""
        self.waiting.extendleft((start, 1) for start in reversed(starts))
        for start in starts:
            if start.fork is not None and start.spec.parent is not None:
                self.parents.pending_children[start.spec.id] = start.spec.parent.parent

    def _start(self, start: Start, attempt: int) -> None:
        # An episode of a task in quarantine is recorded as aborted without any call.
        reason = self.quarantine.tasks.get(start.spec.task)
        fork = start.fork if reason is None else None
        loop = play(start.spec, self.max_turns, fork=fork, path=start.path, gate=self.gate)
        running = self.active[start.spec.id] = _Running(start, attempt, loop)
        effect = next(loop)
        if reason is None:
            self._submit(running, effect)
        else:
            self._advance(running, Stop(StopReason.WORKER_ERROR, reason))

    def _process_environments(self) -> bool:
        """Continue the episodes whose environment has answered; return whether there were any."""
        with self.environment_time.running():
            answers = self.environments.poll(wait=not self.replies_pending)
        for episode_id, answer in answers:
            running = self.active[episode_id]
            if running.restoring and isinstance(answer, Stop):
                # The parent's actions are played again in another environment.
                self.environments.release(episode_id, broken=True)
            self._advance(running, answer)
        return bool(answers)

    def _process_replies(self) -> None:
        """Continue the episodes to which the player has replied."""
        with self.player_time.running():
            answers = self.player.poll()
        for episode_id, answer in answers:
            if episode_id not in self.active or not self.active[episode_id].awaits_reply:
                raise ValueError(f"the player replied to {episode_id!r}, which had not asked")
            self.active[episode_id].awaits_reply = False
            self.replies_pending -= 1
            self._advance(self.active[episode_id], answer)

    def _advance(self, running: _Running, answer: Answer) -> None:
        """Send an answer to its episode, which asks for the next one or ends."""
        running.bystander = isinstance(answer, Stop) and answer.bystander
        try:
            effect = running.loop.send(answer)
        except StopIteration as end:
            self._end(running, end.value)
        else:
            self._submit(running, effect)

    def _submit(self, running: _Running, effect: Effect) -> None:
        """Pass on what an episode asks for, to its environment or to the player."""
        running.restoring = isinstance(effect, Restore)
        if not isinstance(effect, ActionRequest):
            self.environments.submit(running.id, effect)
            return
        if effect.attempt:
            self._forget_reply(running)
        else:
            # Branches are scheduled before the reply, so that the player generates all of them in one batch.
            self._branch(running, effect.turn)
        with self.player_time.running():
            self.player.submit(effect)
        running.awaits_reply = True
        self.replies_pending += 1
        self._close_parents(running.id)

    def _branch(self, running: _Running, turn: int) -> None:
        """Let others branch from an episode before its reply, or fork its parent's tokens for it."""
        fork, path = running.start.fork, running.start.path
        if turn > path.inherited:  # inherited turns were reported for the parent already
            self._schedule(self.scheduler.reached(running.id))
        elif fork is not None and path.parent is not None and path.branching != "diverged":
            with self.player_time.running():
                self.player.fork(running.id, path.parent.parent, fork.turns, fork.prefix_ids)

    def _forget_reply(self, running: _Running) -> None:
        """Let the player go back to the state before its last reply."""
        fork, path = running.start.fork, running.start.path
        given = fork is not None and path.branching != "diverged" and len(path.turns) == path.inherited
        with self.player_time.running():
            self.player.fork(
                running.id,
                running.id,
                tuple(path.turns),
                fork.prefix_ids if fork is not None and given else (),
            )

    def _close_parents(self, child: str) -> None:
        """Close the ended parents that no child needs, now that `child` has its tokens or has ended."""
        for parent in self.parents.release(child, self.scheduler.revisits):
            self.player.close(parent)

    def _end(self, running: _Running, episode: Episode) -> None:
        """Queue the next attempt at an episode that failed, or record it."""
        del self.active[episode.id]
        self.environments.release(episode.id, broken=episode.stop.aborted)
        attempt = self.retries.next_attempt(episode, running.attempt, bystander=running.bystander)
        # A new attempt would replace the turns that children of the episode hold.
        if attempt is None or self.scheduler.branched(episode.id):
            self._finish(running, episode)
            return
        running.start.path.begin(running.start.spec.parent)  # nobody branches from a failed attempt
        self.waiting.append((running.start, attempt))
        self.player.close(episode.id)
        self.failures.append(episode)

    def _finish(self, running: _Running, episode: Episode) -> None:
        """Record an episode that is not played again."""
        self._schedule(self.scheduler.ended(episode))
        self.parents.retained_parents.add(episode.id)
        self._close_parents(episode.id)
        if running.start.path.branching is not None:
            self.branches[running.start.path.branching] += 1
        if not episode.stop.aborted:
            self.quarantine.clear(episode.task)
        self.finished[episode.id] = episode
        if self.on_episode is not None:
            self.on_episode(episode)
        if episode.stop.aborted:
            check_aborted(self.finished.values(), self.max_aborted)
