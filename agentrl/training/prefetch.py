"""Rollouts for the training steps: one after the other, or ahead of the learner in a thread of their own.

Ahead, step k is played with weights that are at most `max_staleness` updates older than those that learn from
it. New weights reach the engine between two of its passes: episodes in progress continue with them, and their
tokens record which version generated them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from agentrl.algorithms.hooks import Context
from agentrl.policy.engine import Adapter, Engine, Generation, GenerationRequest
from agentrl.run.timers import Timers
from agentrl.training.rollouts import RolloutResult, Rollouts
from agentrl.training.setup import Session
from agentrl.training.state import TrainingState

Play = Callable[[int, Context], RolloutResult]  # (tasks drawn before, context of the step)
Agree = Callable[[Context | None], Context | None]
_STOP_TIMEOUT = 5.0  # seconds for the thread to end after its current pass


@dataclass(frozen=True)
class StepRollout:
    """The episodes of one training step.

    Args:
        result: What was played.
        context: The context that it was played in.
        seconds: How long it took.
    """

    result: RolloutResult
    context: Context
    seconds: float


class SyncRollouts:
    """Source that plays a step when it is asked for it.

    Args:
        play: Plays a step.
        cursor: The tasks drawn so far.
    """

    def __init__(self, play: Play, cursor: int) -> None:
        self._play, self._cursor = play, cursor

    def collect(self, context: Context) -> StepRollout:
        """Play the step of the context and return it."""
        began = time.perf_counter()
        played = self._play(self._cursor, context)
        self._cursor += len(played.groups)
        return StepRollout(played, context, time.perf_counter() - began)

    @contextmanager
    def new_weights(self, context: Context) -> Iterator[None]:
        """Let the block give the engine new weights."""
        yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the block use the engine for something else."""
        yield

    def close(self) -> None:
        """Stop playing."""


class AsyncRollouts:
    """Source that plays steps in a thread of its own, ahead of the learner.

    Args:
        play: Plays a step with `engine`.
        cursor: The tasks drawn so far.
        engine: The engine, which others use only within `new_weights` and `paused`.
        context: The context of the next step.
        steps: The number of steps of the run.
        max_staleness: The largest number of updates between the weights that begin a step and those that
            learn from it; 0 plays and learns in turns.
        furthest: With several ranks: maps the number of steps that this rank has begun to the largest number
            that any rank has begun. All ranks call it at the same pause.
        agree: With several ranks: maps the context in which this rank would begin its next step, or None if
            it is done, to the one in which all ranks begin it. All ranks call it before each step, because a
            rank that began a step alone would wait in it for the others.
    """

    def __init__(
        self,
        play: Play,
        cursor: int,
        engine: "SharedEngine",
        context: Context,
        steps: int,
        max_staleness: int,
        furthest: Callable[[int], int] = int,
        agree: Agree = lambda own: own,
    ) -> None:
        self._play, self._cursor, self._engine = play, cursor, engine
        self._steps, self._max_staleness = steps, max_staleness
        self._furthest, self._agree = furthest, agree
        self._latest = _copied(context)  # the trainer goes on to fill its history
        self._next = context.step  # the next step to be played
        self._ready: deque[StepRollout] = deque()
        self._error: BaseException | None = None
        self._until: int | None = None  # while paused: no step from this one on is begun
        self._playing = self._closed = False
        self._changed = threading.Condition()
        self._player_waited = self._learner_waited = 0.0
        self._thread = threading.Thread(target=self._work, name="rollout", daemon=True)
        self._thread.start()

    @property
    def waited(self) -> tuple[float, float]:
        """Return the seconds that the learner waited for a step, and the player to begin one."""
        return self._learner_waited, self._player_waited

    def collect(self, context: Context) -> StepRollout:
        """Wait for the next step and return it.

        Raises:
            BaseException: What playing it raised.
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
        """Let the block give the engine new weights, between two of its passes.

        Args:
            context: The context of the step that comes next.
        """
        with self._engine.held():
            yield
        with self._changed:
            self._latest = _copied(context)
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the block use the engine for something else, after the steps that were begun."""
        with self._changed:
            self._until = begun = self._next + self._playing
        # A rank that did not begin a step that another has begun would leave it waiting for its part.
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
        """Stop playing; the step in progress is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._engine.stop()
        self._thread.join(_STOP_TIMEOUT)

    def _work(self) -> None:
        try:
            while (context := self._wait_for_turn()) is not None:
                began = time.perf_counter()
                result = self._play(self._cursor, context)
                with self._changed:
                    self._ready.append(StepRollout(result, context, time.perf_counter() - began))
                    self._cursor += len(result.groups)
                    self._next += 1
                    self._playing = False
                    self._changed.notify_all()
        except BaseException as error:  # raised in the thread that waits for the step
            with self._changed:
                self._error, self._playing = error, False
                self._changed.notify_all()

    def _wait_for_turn(self) -> Context | None:
        """Wait until the next step may be played and return its context, None when all are played."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_begin())
            self._player_waited += time.perf_counter() - began
            if self._next >= self._steps:
                return None
            self._playing = True
            own = None if self._closed else replace(self._latest, step=self._next)
        return self._agree(own)

    def _may_begin(self) -> bool:
        if self._until is not None and self._next >= self._until:
            return False
        done = self._next >= self._steps
        return done or self._next <= self._latest.step + self._max_staleness


class SharedEngine:
    """Engine that one thread generates with while another gives it new weights between two passes.

    Args:
        engine: The engine, which both threads use through this object only.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_context, self.provides = engine.max_context, engine.provides
        # A lock alone is not fair: the second one keeps the next pass from starting while weights wait.
        self._gate, self._in_use = threading.Lock(), threading.Lock()
        self._stopped = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the other thread out of the engine in this block, once the pass in progress has ended."""
        with self._gate, self._in_use:
            yield

    def stop(self) -> None:
        """Make the next call of the thread that generates fail."""
        self._stopped = True

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request."""
        with self._entered():
            self._engine.submit(request)

    def step(self) -> Sequence[Generation]:
        """Run one pass and return the generations that it finished."""
        with self._entered():
            return self._engine.step()

    def release(self, sequence: str) -> None:
        """Forget a sequence; also after `stop`."""
        with self._gate:
            pass
        with self._in_use:
            self._engine.release(sequence)

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        """Take new weights; only within `held`."""
        self._engine.refresh(version, adapter)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._gate:
            pass
        with self._in_use:
            if self._stopped:
                raise RuntimeError("the rollout was stopped")
            yield


@contextmanager
def open_source(
    session: Session, rollouts: Rollouts, state: TrainingState, timers: Timers
) -> Iterator[SyncRollouts | AsyncRollouts]:
    """Open what plays the training steps, one after the other or ahead, as `trainer.mode` says."""
    config, ranks = session.config, session.rollout_ranks

    def agree(own: Context | None) -> Context | None:
        # Histories of the ranks may be a step apart: the first rank's is taken, None once any rank is done.
        answers = ranks.gather((own is None, own if ranks.first else None))
        return None if any(done for done, _ in answers) else answers[0][1]

    if config.trainer.mode == "sync":
        yield SyncRollouts(partial(rollouts.play, session.engine), state.tasks_drawn)
        return
    shared = SharedEngine(session.engine)
    source = AsyncRollouts(
        partial(rollouts.play, shared),
        state.tasks_drawn,
        shared,
        state.context(),
        config.trainer.steps,
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
