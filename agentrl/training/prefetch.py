"""Who plays while who learns: one after the other, or side by side with a bound on how far they part.

Side by side, a thread plays the next steps while the trainer learns from the last one. Step k is played from
weights of at most `max_staleness` updates before it is learned from. New weights reach it between two passes
of the engine: episodes in flight go on with them, and their tokens say which version drew them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from agentrl.algorithms.hooks import Context
from agentrl.policy.engine import Engine, Generation, GenerationRequest
from agentrl.run.timers import Timers
from agentrl.training.rollouts import RolloutResult, Rollouts
from agentrl.training.setup import Session
from agentrl.training.state import TrainingState

Play = Callable[
    [int, Context], RolloutResult
]  # from how many tasks were drawn before, in the context of its step
Agree = Callable[[Context | None], Context | None]
_LAST_PASS = 5.0  # seconds for the thread to notice that it is over


@dataclass(frozen=True)
class StepRollout:
    """What is to be learned from next, the context that it was played in, and the seconds that it took."""

    result: RolloutResult
    context: Context
    seconds: float


class SyncRollouts:
    """Plays a step when it is asked for.

    Args:
        play: plays a step.
        cursor: tasks drawn so far.
    """

    def __init__(self, play: Play, cursor: int) -> None:
        self._play, self._cursor = play, cursor

    def next(self, context: Context) -> StepRollout:
        """Play the step of the context."""
        began = time.perf_counter()
        played = self._play(self._cursor, context)
        self._cursor += len(played.groups)
        return StepRollout(played, context, time.perf_counter() - began)

    @contextmanager
    def new_weights(self, context: Context) -> Iterator[None]:
        """Give the engine new weights in this block."""
        yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Use the engine for something else in this block."""
        yield

    def close(self) -> None:
        """Stop playing."""


class AsyncRollouts:
    """Plays steps in a thread of its own, ahead of those that are asked for.

    Args:
        play: plays a step, with `engine`.
        cursor: tasks drawn so far.
        engine: that nobody else uses but in the blocks of `new_weights` and `paused`.
        context: of the next step, with a history that does not change.
        max_staleness: how many updates may lie between the weights that a step is begun with and those that
            learn from it; 0 is taking turns.
        furthest: of ranks that play together, told how many steps this one has begun, says how many the
            furthest has; all call it at the same pause.
        agree: of ranks that play together, told in what context this one begins its next step, None when it
            is over, says in which they all do; all call it before each step. Who begins a step alone would
            wait in it for the others.

    Attributes:
        waited: seconds that the learner waited for a step, and the player to begin one.
    """

    def __init__(
        self,
        play: Play,
        cursor: int,
        engine: "SharedEngine",
        context: Context,
        max_staleness: int,
        furthest: Callable[[int], int] = int,
        agree: Agree = lambda own: own,
    ) -> None:
        self._play, self._cursor, self._engine, self._most = play, cursor, engine, max_staleness
        self._furthest, self._agree = furthest, agree
        self._latest = _copied(context)  # the trainer goes on to fill its history
        self._next = context.step  # to be played
        self._ready: deque[StepRollout] = deque()
        self._error: BaseException | None = None
        self._until: int | None = None  # no step from this one on is begun
        self._playing = self._over = False
        self._changed = threading.Condition()
        self._player_waited = self._learner_waited = 0.0
        self._thread = threading.Thread(target=self._work, name="rollout", daemon=True)
        self._thread.start()

    @property
    def waited(self) -> tuple[float, float]:
        return self._learner_waited, self._player_waited

    def next(self, context: Context) -> StepRollout:
        """Wait for the step of the context.

        Raises:
            BaseException: what playing it raised.
        """
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            self._learner_waited += time.perf_counter() - began
            if self._ready:
                return self._ready.popleft()
            assert self._error is not None
            raise self._error

    @contextmanager
    def new_weights(self, context: Context) -> Iterator[None]:
        """Give the engine new weights in this block, between two of its passes.

        Args:
            context: of the step that comes next, with a history that does not change.
        """
        with self._engine.held():
            yield
        with self._changed:
            self._latest = _copied(context)
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Use the engine for something else in this block, after the steps that were begun."""
        with self._changed:
            self._until = begun = self._next + self._playing
        # A rank that did not begin what another has would leave it waiting for its part.
        until = self._furthest(begun)
        with self._changed:
            self._until = until
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._next >= until or self._error is not None)
        try:
            yield
        finally:
            with self._changed:
                self._until = None
                self._changed.notify_all()

    def close(self) -> None:
        """Stop playing; what is being played is lost."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._engine.stop()
        self._thread.join(_LAST_PASS)

    def _work(self) -> None:
        try:
            while (context := self._permission()) is not None:
                began = time.perf_counter()
                played = self._play(self._cursor, context)
                with self._changed:
                    self._ready.append(StepRollout(played, context, time.perf_counter() - began))
                    self._cursor += len(played.groups)
                    self._next += 1
                    self._playing = False
                    self._changed.notify_all()
        except BaseException as error:  # whoever waits for the step is told
            with self._changed:
                self._error, self._playing = error, False
                self._changed.notify_all()

    def _permission(self) -> Context | None:
        """Wait until the next step may be played; None when it is over."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._may_begin())
            self._player_waited += time.perf_counter() - began
            if self._next >= self._latest.total_steps:
                return None
            self._playing = True
            own = None if self._over else replace(self._latest, step=self._next)
        return self._agree(own)

    def _may_begin(self) -> bool:
        if self._until is not None and self._next >= self._until:
            return False
        return self._next <= self._latest.step + self._most or self._next >= self._latest.total_steps


class SharedEngine:
    """An engine that one thread generates with, and another gives new weights between two passes.

    Args:
        engine: used through this alone while both do.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_context, self.provides = engine.max_context, engine.provides
        # Who wants new weights stands in the door, so that no further pass begins; a lock alone is not fair.
        self._door, self._room = threading.Lock(), threading.Lock()
        self._stopped = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out, as soon as what runs has ended."""
        with self._door, self._room:
            yield

    def stop(self) -> None:
        """Let whoever generates fail at the next call."""
        self._stopped = True

    def submit(self, request: GenerationRequest) -> None:
        with self._entered():
            self._engine.submit(request)

    def step(self) -> Sequence[Generation]:
        with self._entered():
            return self._engine.step()

    def release(self, sequence: str) -> None:
        with self._door:
            pass
        with self._room:
            self._engine.release(sequence)

    def refresh(self, version: int) -> None:
        """Only for who holds it."""
        self._engine.refresh(version)

    def close(self) -> None:
        self._engine.close()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._door:
            pass
        with self._room:
            if self._stopped:
                raise RuntimeError("the rollout was stopped")
            yield


@contextmanager
def open_source(
    session: Session, rollouts: Rollouts, state: TrainingState, timers: Timers
) -> Iterator[SyncRollouts | AsyncRollouts]:
    """Open what plays the training steps, one after the other or ahead, as `trainer.mode` says."""
    config, ranks = session.config, session.rollout_ranks

    def play(engine: Engine, cursor: int, context: Context) -> RolloutResult:
        player = session.policy.player(engine, config, rollouts.temperature(context))
        with timers.running("rollout"):
            result = rollouts.play(player, cursor, context)
        timers.add("rollout.environment.wall", result.environment_seconds)
        timers.add("rollout.generation.wall", result.player_seconds)
        return result

    def agree(own: Context | None) -> Context | None:
        # Histories of the ranks may be a step apart: the first rank's is taken, None once any rank is done.
        answers = ranks.gather((own is None, own if ranks.first else None))
        return None if any(done for done, _ in answers) else answers[0][1]

    if config.trainer.mode == "sync":
        yield SyncRollouts(partial(play, session.engine), state.tasks_drawn)
        return
    shared = SharedEngine(session.engine)
    source = AsyncRollouts(
        partial(play, shared),
        state.tasks_drawn,
        shared,
        state.context(),
        config.trainer.max_staleness,
        furthest=lambda begun: max(session.ranks.gather(begun)),
        agree=agree,
    )
    try:
        yield source
    finally:
        source.close()
        for thread, seconds in zip(("learning", "rollout"), source.waited, strict=True):
            timers.add(f"{thread}.waited.wall", seconds)
        timers.save()


def _copied(context: Context) -> Context:
    return replace(context, history={name: list(values) for name, values in context.history.items()})
