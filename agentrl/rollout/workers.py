"""Environments in supervised worker processes: one that crashes, hangs or needs too much memory is replaced.

Every request has a deadline for its answer. When a process dies, or is killed because it is late or too
large, the processes that it started end with it. Its episodes end as aborted, and the collector plays them
again.
"""

import math
import os
import pickle
import selectors
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, cast

import cloudpickle

from agentrl.data.trajectory import StopReason
from agentrl.env.containment import describe_error
from agentrl.errors import AgentRLError, ConfigError
from agentrl.rollout.environments import Answered, Environments, Make, RemoteEnv, TextGym, overdue
from agentrl.rollout.play import EnvironmentCall, Step, Stop, Transition
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.worker import Answer, CallTimes, pack, unpack
from agentrl.rollout.worker_process import Slot, WorkerProcess

_HARD_LIMIT_FACTOR = 1.5  # times `recycle_megabytes`: a worker with more is killed during its episodes


class ProcessEnvironments(Environments):
    """Environments in worker processes.

    Args:
        make: The function that makes an environment. It is sent to the workers: a function or class of an
            importable module, an `agentrl.env.Factory`, or anything that cloudpickle can send by value.
        capacity: The number of episodes at a time.
        config: The number of workers, their deadlines and when they are recycled.
    """

    def __init__(self, make: Make, capacity: int, config: WorkersConfig | None = None) -> None:
        self._config = config or WorkersConfig()
        count = min(self._config.count or os.cpu_count() or 1, capacity)
        each = self._config.environments or -(-capacity // count)
        self.capacity = min(capacity, count * each)
        self._count, self._per_worker = count, each
        self._make = cloudpickle.dumps(make)
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._stopping: list[WorkerProcess] = []
        self._closing = threading.RLock()  # a thread that collects and its owner may close at the same time
        self._slot_of: dict[str, Slot | None] = {}  # None: its worker was lost
        self._backlog: deque[tuple[str, EnvironmentCall]] = deque()
        self._ready: deque[Answered] = deque()
        self._excluded: dict[str, WorkerProcess] = {}  # the worker in which an episode failed last
        self._borrow_answers: dict[Slot, Answer] = {}  # answers for borrowed slots
        self._any_ready = False

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Queue a call for the episode's environment; a new episode gets the next free slot."""
        slot = self._slot_of.get(episode)
        if slot is not None:
            self._call(slot, effect)
        elif episode in self._slot_of:
            lost = "its worker died between two calls"
            self._ready.append((episode, Stop(StopReason.WORKER_ERROR, lost, bystander=True)))
        elif isinstance(effect, Step):
            raise ValueError(f"{episode!r} is not being played, so it cannot step")
        else:
            self._backlog.append((episode, effect))

    def poll(self, *, wait: bool, max_wait: float = math.inf) -> Sequence[Answered]:
        """Return the answers that have come; with `wait`, at least one if any is pending and comes in time.

        Args:
            wait: Whether to wait for an answer when there is none.
            max_wait: The maximum time to wait, in seconds.
        """
        until = time.monotonic() + max_wait
        self._assign_backlog()
        self._exchange(0.0)
        while wait and not self._ready and any(worker.pending for worker in self._workers):
            if (left := until - time.monotonic()) <= 0:
                break
            self._exchange(left)
            self._assign_backlog()
        answers = list(self._ready)
        self._ready.clear()
        return answers

    def release(self, episode: str, *, broken: bool = False) -> None:
        """Free the episode's slot, and replace the worker if it is due for recycling."""
        slot = self._slot_of.pop(episode, None)
        if slot is None:
            return
        worker = slot.worker
        worker.episodes_played += 1
        self._free_slot(slot, broken)
        if broken:
            self._excluded[episode] = worker
        worker.retiring = worker.retiring or self._needs_recycling(worker)
        if worker.retiring and not worker.busy:
            self.recycled += 1
            self._stop_worker(worker)

    def _free_slot(self, slot: Slot, broken: bool) -> None:
        slot.episode = None
        if broken and slot.has_env:
            slot.has_env = False
            self._request(slot, "discard")

    def _needs_recycling(self, worker: WorkerProcess) -> bool:
        episodes, megabytes = self._config.recycle_episodes, self._config.recycle_megabytes
        if episodes is not None and worker.episodes_played >= episodes:
            return True
        return megabytes is not None and worker.megabytes() > megabytes

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        """Lend an environment of a worker for the length of a `with` block."""
        with self._borrowed() as slot:
            yield cast(TextGym, RemoteEnv(lambda *asked: self._ask(slot, "ask", asked)))

    @contextmanager
    def _borrowed(self) -> Iterator[Slot]:
        slot = self._find_slot(None)
        if slot is None:
            raise RuntimeError("every environment is in use; borrow before or after a collection")
        slot.episode, slot.borrowed = "", True
        broken = True
        try:
            if not slot.has_env:
                self._ask(slot, "construct", None)
                slot.has_env = True
            yield slot
            broken = False
        finally:
            if slot.worker in self._workers:
                slot.borrowed = False
                self._free_slot(slot, broken)

    def time_calls(self, tasks: Sequence[str], seed: int) -> CallTimes:
        """Measure in a worker how long the calls of a few short episodes take."""
        with self._borrowed() as slot:
            return CallTimes(*self._ask(slot, "time", (list(tasks), seed)))

    def close(self) -> None:
        """End all workers, and wait until they have gone."""
        with self._closing:
            for worker in list(self._workers):  # all at once, so that they close in parallel
                self._stop_worker(worker)
            self._slot_of.clear()
            self._backlog.clear()
            self._excluded.clear()
            self._ready.clear()
            until = time.monotonic() + 10.0
            while self._stopping:
                self._reap(until)
                if self._stopping:
                    time.sleep(0.01)

    def _request(self, slot: Slot, kind: str, payload: Any = None) -> None:
        slot.worker.outbox.append((slot.index, kind, payload))

    def _call(self, slot: Slot, call: EnvironmentCall) -> None:
        self._request(slot, type(call).__name__.lower(), astuple(call))

    def _assign_backlog(self) -> None:
        """Assign slots to waiting episodes, and start workers while there are fewer than configured."""
        while self._backlog:
            episode, call = self._backlog[0]
            slot = self._find_slot(episode)
            if slot is None:
                return
            self._backlog.popleft()
            self._excluded.pop(episode, None)
            slot.episode = episode
            self._slot_of[episode] = slot
            if not slot.has_env:
                self._request(slot, "construct")
                slot.has_env = True
            self._call(slot, call)

    def _find_slot(self, episode: str | None) -> Slot | None:
        """Return a slot of an idle worker, else of a new one, else of the least busy one."""
        # A retry avoids the worker in which the episode failed, as long as another one has room.
        staying = [worker for worker in self._workers if not worker.retiring]
        candidates = [worker for worker in staying if worker.free]
        elsewhere = [worker for worker in candidates if worker is not self._excluded.get(episode or "")]
        if len(staying) < self._count and all(worker.busy for worker in elsewhere):
            return self._start().slots[0]
        if not candidates:
            return None
        worker = min(elsewhere or candidates, key=lambda worker: worker.busy)
        return max(worker.free, key=lambda slot: slot.has_env)  # reuse an environment if there is one

    def _start(self) -> WorkerProcess:
        limit = self._config.recycle_megabytes
        worker = WorkerProcess.start(
            self._make,
            self._per_worker,
            self._config.interpreter,
            None if limit is None else limit * _HARD_LIMIT_FACTOR,
        )
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _exchange(self, timeout: float) -> None:
        """Send and receive; wait for `timeout` seconds at most, and not beyond the next deadline."""
        for worker in list(self._workers):
            self._send(worker)
        self._reap(time.monotonic() + 10.0)
        now = time.monotonic()
        left = min((worker.deadline - now for worker in self._workers if worker.pending), default=0.0)
        for key, _ in self._selector.select(max(0.0, min(timeout, left))):
            worker = key.data
            if not self._receive(worker):
                self._drop_worker(worker, worker.crash_log())
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.pending and now >= worker.deadline]:
            _, kind, limit = worker.pending[0]
            self._drop_worker(worker, overdue(kind, limit))

    def _send(self, worker: WorkerProcess) -> None:
        """Send a batch if the last one is answered, so that neither side blocks in a write."""
        if worker.pending or not worker.outbox:
            return
        batch, worker.outbox = worker.outbox, []
        for index, kind, _ in batch:
            worker.pending.append((worker.slots[index], kind, self._limit(kind)))
        worker.last_active = time.monotonic()
        try:
            worker.socket.sendall(pack(batch))
        except OSError:
            self._drop_worker(worker, worker.crash_log())

    def _limit(self, kind: str) -> float:
        config = self._config
        if kind == "construct":
            return config.construct_timeout
        return config.step_timeout if kind == "step" else config.reset_timeout

    def _receive(self, worker: WorkerProcess) -> bool:
        """Process what a worker has sent; return False when it has closed the connection."""
        try:
            data = worker.socket.recv(1 << 20)
        except OSError:
            return False
        worker.buffer += data
        for message in unpack(worker.buffer):
            if not worker.ready:  # the first message says that the process has started
                worker.ready = self._any_ready = True
                continue
            if not worker.pending:
                self._drop_worker(worker, "its worker sent an answer without a request")
                return True
            worker.last_active = time.monotonic()
            answer = _read_answer(worker, message)
            if answer[1] == "outgrown":
                self._drop_worker(worker, self._memory_error(answer[2]))
                return True
            self._handle_answer(worker, answer)
        self._send(worker)
        return bool(data)

    def _memory_error(self, megabytes: float) -> str:
        limit = self._config.recycle_megabytes or 0
        return (
            f"its worker held {megabytes:.0f} MB in the middle of an episode, more than "
            f"{limit * _HARD_LIMIT_FACTOR:.0f} MB, that is {_HARD_LIMIT_FACTOR:g} times "
            f"rollout.workers.recycle_megabytes={limit}"
        )

    def _handle_answer(self, worker: WorkerProcess, answer: Answer) -> None:
        slot, kind, _ = worker.pending.popleft()
        _, found, payload = answer
        if kind == "discard" or found == "void":
            return  # "void" follows a failed "construct", which has been reported
        if slot.borrowed:
            self._borrow_answers[slot] = answer
        elif found == "refused":  # an AgentRLError: every other environment would fail alike
            raise payload
        elif found == "transition":
            self._ready.append((cast(str, slot.episode), Transition(*payload)))
        elif found == "stop":
            reason, error, _ = payload
            slot.has_env = slot.has_env and kind != "construct"
            self._ready.append((cast(str, slot.episode), Stop(StopReason(reason), error)))

    def _ask(self, slot: Slot, kind: str, payload: Any) -> Any:
        """Send a request for a borrowed slot and return its answer."""
        self._borrow_answers.pop(slot, None)
        self._request(slot, kind, payload)
        while slot not in self._borrow_answers:
            if slot.worker not in self._workers:
                raise EnvironmentLostError(f"{kind}: {slot.worker.exit_reason}")
            self._exchange(math.inf)
        _, found, answer = self._borrow_answers.pop(slot)
        if found in ("raised", "refused"):
            raise answer
        if found == "stop":
            raise EnvironmentLostError(f"{kind}: {answer[1]}")
        return answer

    def _drop_worker(self, worker: WorkerProcess, reason: str) -> None:
        """Kill a worker and end its episodes; the one whose answer is next is held responsible."""
        if worker not in self._workers:
            return
        self._unregister(worker)
        process = worker.process
        ended, megabytes, start_error = process.exit_code(), process.memory_exceeded, process.start_error
        # A process that exits by itself before any was ready would do so again: its setup is wrong.
        cannot_start = not self._any_ready and ended is not None and ended >= 0
        worker.kill()
        if start_error is not None:
            raise ConfigError(
                f"rollout.workers.interpreter: {worker.interpreter} does not run: {start_error}"
            )
        if megabytes is not None:
            reason = self._memory_error(megabytes)
        worker.exit_reason = reason
        self.restarts += 1
        if cannot_start:
            raise ConfigError(f"an environment worker cannot start: {reason}")
        # Answers come in order, so the first pending request is the one that the worker was carrying out.
        blamed = worker.pending[0][0] if worker.pending else None
        waiting = {slot.index for slot, _, _ in worker.pending} | {index for index, _, _ in worker.outbox}
        for slot in worker.slots:
            if slot.episode is None or slot.borrowed:
                continue
            self._slot_of[slot.episode] = None  # an episode without a request learns of it at its next one
            if slot.index in waiting:
                what = reason if slot is blamed else f"its worker died: {reason}"
                stop = Stop(StopReason.WORKER_ERROR, what, bystander=slot is not blamed)
                self._ready.append((slot.episode, stop))

    def _unregister(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)

    def _stop_worker(self, worker: WorkerProcess) -> None:
        """End a worker: at once if it has a pending request, else after it has closed its environments."""
        self._unregister(worker)
        if worker.pending:
            worker.kill()
        else:
            worker.close_requests()
            self._stopping.append(worker)

    def _reap(self, until: float) -> None:
        """Clean up after the stopped workers that have ended, and kill those that take too long."""
        with self._closing:
            for worker in list(self._stopping):
                late = time.monotonic() > min(until, worker.last_active + 10.0)
                if late or worker.process.exit_code() is not None:
                    worker.kill()
                    self._stopping.remove(worker)


class EnvironmentLostError(AgentRLError):
    """A worker whose answer was waited for died, or was killed because it was late."""


def _read_answer(worker: WorkerProcess, message: bytes) -> Answer:
    """Unpickle an answer; one that cannot be unpickled here is an error of the environment."""
    slot, kind, _ = worker.pending[0]
    try:
        number, found, payload = pickle.loads(message)
    except (Exception, SystemExit) as error:
        what = f"the answer of its {kind} cannot be read here: {describe_error(error)}"
        if slot.borrowed:
            return slot.index, "raised", EnvironmentLostError(what)
        return slot.index, "stop", astuple(Stop(StopReason.CONTRACT, what))
    return number, found, payload
