"""Playing and learning side by side: never further apart than allowed, and nothing gets lost."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from agentrl.algorithms.hooks import Context
from agentrl.data import Group
from agentrl.policy.engine import Adapter, Generation, GenerationRequest, SamplingParams
from agentrl.training.prefetch import AsyncRollouts, SharedEngine, SyncRollouts
from agentrl.training.rollouts import RolloutResult

STEPS = 8


@dataclass
class Passes:
    """An engine that tells when it is used; a pass lasts until it is let go."""

    max_context: int = 8
    provides: frozenset[str] = frozenset()
    entered: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    log: list[str] = field(default_factory=list)

    def submit(self, request: GenerationRequest) -> None:
        self.log.append("submit")

    def step(self) -> Sequence[Generation]:
        self.entered.set()
        assert self.let_go.wait(10)
        self.log.append("step")
        return []

    def release(self, sequence: str) -> None:
        self.log.append("release")

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        self.log.append(f"refresh {version}")

    def close(self) -> None:
        self.log.append("close")


def context(step: int) -> Context:
    return Context(step, STEPS, {})


class Steps:
    """Plays two groups a step, and notes what was known when a step was begun."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []  # (step, tasks drawn before)
        self.version = 0
        self.versions: list[int] = []
        self.may_end = threading.Semaphore(0)

    def __call__(self, cursor: int, context: Context) -> RolloutResult:
        self.begun.append((context.step, cursor))
        self.versions.append(self.version)
        assert self.may_end.acquire(timeout=10)
        return RolloutResult(groups=[Group(f"task {cursor + k}", ()) for k in range(2)], rounds=1)


@pytest.fixture
def play() -> Iterator[Steps]:
    player = Steps()
    yield player
    player.may_end.release(100)


def begun(play: Steps, count: int) -> bool:
    """Whether so many steps are begun, and no further one soon after."""
    for _ in range(500):
        if len(play.begun) >= count:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.05)
    return len(play.begun) == count


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_step_is_begun_at_most_so_many_updates_before_it_is_learned_from(most: int, play: Steps) -> None:
    play.may_end.release(100)
    steps = AsyncRollouts(play, 6, SharedEngine(Passes()), context(0), STEPS, most)
    try:
        assert begun(play, most + 1)
        for step in range(STEPS):
            found = steps.collect(context(step))
            assert [group.task for group in found.result.groups] == [
                f"task {6 + 2 * step + k}" for k in (0, 1)
            ]
            assert found.context.step == step
            with steps.new_weights(context(step + 1)):
                play.version = step + 1
            assert begun(play, min(STEPS, step + most + 2))
    finally:
        steps.close()
    assert play.begun == [(step, 6 + 2 * step) for step in range(STEPS)]
    assert play.versions == [max(0, step - most) for step in range(STEPS)]


def test_taking_turns_draws_the_same_tasks(play: Steps) -> None:
    play.may_end.release(100)
    steps = SyncRollouts(play, 6)
    for step in range(3):
        steps.collect(context(step))
    assert play.begun == [(0, 6), (1, 8), (2, 10)]


def test_what_playing_raises_reaches_who_waits_after_what_was_played(play: Steps) -> None:
    def fails(cursor: int, context: Context) -> RolloutResult:
        if context.step == 1:
            raise RuntimeError("no more tasks")
        return play(cursor, context)

    play.may_end.release(100)
    steps = AsyncRollouts(fails, 0, SharedEngine(Passes()), context(0), STEPS, 3)
    try:
        assert steps.collect(context(0)).context.step == 0
        with pytest.raises(RuntimeError, match="no more tasks"):
            steps.collect(context(1))
    finally:
        steps.close()


def test_a_pause_waits_for_the_step_that_is_played_and_no_further_one_begins(play: Steps) -> None:
    steps = AsyncRollouts(play, 0, SharedEngine(Passes()), context(0), STEPS, 5)
    try:
        assert begun(play, 1)
        threading.Timer(0.1, play.may_end.release).start()
        with steps.paused():
            assert len(play.begun) == 1
            play.may_end.release(100)
            assert begun(play, 1)
            assert steps.collect(context(0)).context.step == 0
        assert begun(play, 6)
    finally:
        steps.close()


def test_ranks_pause_after_the_same_step_whoever_is_ahead() -> None:
    together, meeting = threading.Barrier(2), threading.Barrier(2)
    told: list[int] = []
    begun: tuple[list[int], list[int]] = ([], [])

    def furthest(begun: int) -> int:
        told.append(begun)
        meeting.wait(10)
        return max(told)

    def plays(rank: int, cursor: int, context: Context) -> RolloutResult:
        begun[rank].append(context.step)
        together.wait(10)  # what one has begun ends when the other has begun it as well
        return RolloutResult(groups=[Group("task", ())], rounds=1)

    def pause(rank: int) -> None:
        with ranks[rank].paused():
            paused.append(rank)
            meeting.wait(10)

    late = context(0)
    ranks = [
        AsyncRollouts(partial(plays, rank), 0, SharedEngine(Passes()), late, STEPS, 0, furthest)
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.collect(late).context.step == 0
    paused: list[int] = []
    with ranks[0].new_weights(context(1)):
        pass  # the first begins step 1 before it pauses
    while len(begun[0]) < 2:
        threading.Event().wait(0.01)
    pausing = [threading.Thread(target=pause, args=(rank,), daemon=True) for rank in (1, 0)]
    pausing[0].start()
    while not told:
        threading.Event().wait(0.01)
    with ranks[1].new_weights(context(1)):
        pass  # the second may begin it only when it has paused
    pausing[1].start()
    for thread in pausing:
        thread.join(10)
    for steps in ranks:
        steps.close()
    assert sorted(paused) == [0, 1]
    assert begun == ([0, 1], [0, 1])


def test_ranks_begin_a_step_together_or_not_at_all(play: Steps) -> None:
    meeting = threading.Barrier(2)
    said: tuple[list[Context | None], list[Context | None]] = ([], [])

    def agrees(rank: int, own: Context | None) -> Context | None:
        said[rank].append(own)
        meeting.wait(10)
        return None if None in (said[0][-1], said[1][-1]) else said[0][-1]

    play.may_end.release(100)
    ranks = [
        AsyncRollouts(play, 0, SharedEngine(Passes()), context(0), STEPS, 0, agree=partial(agrees, rank))
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.collect(context(0)).context.step == 0
    with ranks[0].new_weights(context(1)):
        pass
    while len(said[0]) < 2:
        threading.Event().wait(0.01)
    ranks[1].close()  # it has not begun what the first one has
    ranks[0].close()
    assert play.begun == [(0, 0), (0, 0)]
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout"]


def test_new_weights_come_between_two_passes_of_the_engine() -> None:
    inner = Passes()
    shared = SharedEngine(inner)
    player = threading.Thread(target=shared.step)
    player.start()
    assert inner.entered.wait(10)
    threading.Timer(0.1, inner.let_go.set).start()
    with shared.held():
        assert inner.log == ["step"]  # what ran has ended
        waiting = threading.Thread(target=shared.submit, args=(request(),))
        waiting.start()
        shared.refresh(3)
        waiting.join(0.1)
        assert inner.log == ["step", "refresh 3"]
    waiting.join(10)
    player.join(10)
    assert inner.log == ["step", "refresh 3", "submit"]


def test_a_stopped_engine_is_not_used_any_more_but_forgets_what_it_held() -> None:
    inner = Passes()
    shared = SharedEngine(inner)
    shared.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        shared.step()
    with pytest.raises(RuntimeError, match="stopped"):
        shared.submit(request())
    shared.release("a")
    assert inner.log == ["release"]


def test_closing_ends_the_thread_and_what_it_waits_for() -> None:
    def generates(cursor: int, context: Context) -> Any:
        while True:
            shared.step()

    inner = Passes()
    inner.let_go.set()
    shared = SharedEngine(inner)
    steps = AsyncRollouts(generates, 0, shared, context(0), STEPS, 1)
    assert inner.entered.wait(10)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout"]


def request() -> GenerationRequest:
    return GenerationRequest("a", (1,), True, None, 0, SamplingParams())
