"""Environments in processes of their own, supervised: what crashes, hangs or grows is replaced.

An answer is owed for each request, and each has its deadline. A process that dies, or is killed for being
late or for what it holds, takes its episodes with it, and whatever processes these have started; they end as
aborted, and the collector plays them again.
"""

import math
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from typing import IO, Any, cast

import cloudpickle
import psutil

from agentrl.data.trajectory import StopReason
from agentrl.env.containment import describe_error
from agentrl.errors import AgentRLError, ConfigError
from agentrl.rollout.environments import Answered, Environments, Make, RemoteEnv, TextGym, overdue
from agentrl.rollout.play import EnvironmentCall, Step, Stop, Transition
from agentrl.rollout.process_tree import ProcessTree
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.worker import Answer, CallTimes, Request, pack, unpack

_CRASH_LOG_CHARS = 600  # characters of a dead worker's output that go into the error
_HARD_LIMIT_FACTOR = 1.5  # times `recycle_megabytes`: more is not waited for until the episodes have ended
_MEMORY_CHECK_INTERVAL = 1.0  # seconds
_SEND_TIMEOUT = 30.0  # seconds; an idle worker reads at once


class ProcessEnvironments(Environments):
    """Environments in worker processes.

    Args:
        make: makes an environment; sent to the workers, so a function or class of an importable module, an
            `agentrl.env.Factory`, or what cloudpickle can send by value.
        capacity: episodes at a time.
        config: number of workers, deadlines, recycling.
    """

    def __init__(self, make: Make, capacity: int, config: WorkersConfig | None = None) -> None:
        self._config = config or WorkersConfig()
        count = min(self._config.count or os.cpu_count() or 1, capacity)
        each = self._config.environments or -(-capacity // count)
        self.capacity = min(capacity, count * each)
        self._count, self._per_worker = count, each
        self._make = cloudpickle.dumps(make)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._stopping: list[_Worker] = []
        self._closing = threading.RLock()  # who plays in a thread may close at the same time as its owner
        self._slot_of: dict[str, _Slot | None] = {}  # None: its worker is gone
        self._backlog: deque[tuple[str, EnvironmentCall]] = deque()
        self._ready: deque[Answered] = deque()
        self._excluded: dict[str, _Worker] = {}  # where an episode failed: it is tried elsewhere
        self._borrow_answers: dict[_Slot, Answer] = {}  # answers to whoever borrowed the slot
        self._any_ready = False

    # What the collector calls.

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        slot = self._slot_of.get(episode)
        if slot is not None:
            self._call(slot, effect)
        elif episode in self._slot_of:
            lost = "its worker died while it was not being asked"
            self._ready.append((episode, Stop(StopReason.WORKER_ERROR, lost, bystander=True)))
        elif isinstance(effect, Step):
            raise ValueError(f"{episode!r} is not being played, so it cannot step")
        else:
            self._backlog.append((episode, effect))

    def poll(self, *, wait: bool, patience: float = math.inf) -> Sequence[Answered]:
        """Return the answers that are there; with `wait`, at least one that is owed, if it comes in time.

        Args:
            wait: for an answer when there is none.
            patience: seconds to wait at most.
        """
        until = time.monotonic() + patience
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

    def _free_slot(self, slot: "_Slot", broken: bool) -> None:
        slot.episode = None
        if broken and slot.has_env:
            slot.has_env = False
            self._request(slot, "discard")

    def _needs_recycling(self, worker: "_Worker") -> bool:
        episodes, megabytes = self._config.recycle_episodes, self._config.recycle_megabytes
        if episodes is not None and worker.episodes_played >= episodes:
            return True
        return megabytes is not None and worker.megabytes() > megabytes

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        with self._borrowed() as slot:
            yield cast(TextGym, RemoteEnv(lambda *asked: self._ask(slot, "ask", asked)))

    @contextmanager
    def _borrowed(self) -> Iterator["_Slot"]:
        slot = self._find_slot(None)
        if slot is None:
            raise RuntimeError("every slot is being played in; borrow before or after a collection")
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
        """Time a few short episodes inside a worker."""
        with self._borrowed() as slot:
            return CallTimes(*self._ask(slot, "time", (list(tasks), seed)))

    def close(self) -> None:
        with self._closing:
            for worker in list(self._workers):
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

    # Requests and answers.

    def _request(self, slot: "_Slot", kind: str, payload: Any = None) -> None:
        slot.worker.outbox.append((slot.index, kind, payload))

    def _call(self, slot: "_Slot", call: EnvironmentCall) -> None:
        self._request(slot, type(call).__name__.lower(), astuple(call))

    def _assign_backlog(self) -> None:
        """Give slots to the episodes that have none, starting workers while there are too few."""
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

    def _find_slot(self, episode: str | None) -> "_Slot | None":
        """A slot on an idle worker, else on a new one, else on the least busy one."""
        staying = [worker for worker in self._workers if not worker.retiring]
        candidates = [worker for worker in staying if worker.free]
        elsewhere = [worker for worker in candidates if worker is not self._excluded.get(episode or "")]
        if len(staying) < self._count and all(worker.busy for worker in elsewhere):
            return self._start().slots[0]
        if not candidates:
            return None
        worker = min(elsewhere or candidates, key=lambda worker: worker.busy)
        return max(worker.free, key=lambda slot: slot.has_env)

    def _start(self) -> "_Worker":
        limit = self._config.recycle_megabytes
        worker = _Worker.start(
            self._make,
            self._per_worker,
            self._config.interpreter,
            None if limit is None else limit * _HARD_LIMIT_FACTOR,
        )
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _exchange(self, timeout: float) -> None:
        """Send what can be sent, take in what has come; wait for `timeout`, or until the next deadline."""
        for worker in list(self._workers):
            self._send(worker)
        self._reap(time.monotonic() + 10.0)
        now = time.monotonic()
        patience = min((worker.deadline - now for worker in self._workers if worker.pending), default=0.0)
        for key, _ in self._selector.select(max(0.0, min(timeout, patience))):
            worker = key.data
            if not self._receive(worker):
                self._drop_worker(worker, worker.crash_log())
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.pending and now >= worker.deadline]:
            _, kind, limit = worker.pending[0]
            self._drop_worker(worker, overdue(kind, limit))

    def _send(self, worker: "_Worker") -> None:
        """Send a batch, unless the last one is still being answered: neither side ever waits for a reader."""
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

    def _receive(self, worker: "_Worker") -> bool:
        """Take in what a worker sent; False when it has hung up."""
        try:
            data = worker.socket.recv(1 << 20)
        except OSError:
            return False
        worker.buffer += data
        for message in unpack(worker.buffer):
            if not worker.ready:
                worker.ready = self._any_ready = True
                continue
            if not worker.pending:
                self._drop_worker(worker, "its worker answered what it was not asked")
                return True
            worker.last_active = time.monotonic()
            answer = _answer(worker, message)
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

    def _handle_answer(self, worker: "_Worker", answer: Answer) -> None:
        slot, kind, _ = worker.pending.popleft()
        _, found, payload = answer
        if kind == "discard" or found == "void":
            return
        if slot.borrowed:
            self._borrow_answers[slot] = answer
        elif found == "refused":
            raise payload
        elif found == "transition":
            self._ready.append((cast(str, slot.episode), Transition(*payload)))
        elif found == "stop":
            reason, error, _ = payload
            slot.has_env = slot.has_env and kind != "construct"
            self._ready.append((cast(str, slot.episode), Stop(StopReason(reason), error)))

    def _ask(self, slot: "_Slot", kind: str, payload: Any) -> Any:
        """Request, and wait for the answer."""
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

    # The life of a worker.

    def _drop_worker(self, worker: "_Worker", reason: str) -> None:
        """Bury a worker that died or has to; whoever it owed the next answer is held responsible."""
        if worker not in self._workers:
            return
        self._unregister(worker)
        ended, outgrown, fault = (
            worker.process.exit_code(),
            worker.process.memory_exceeded,
            worker.process.start_error,
        )
        cannot_start = not self._any_ready and ended is not None and ended >= 0
        worker.kill()
        if fault is not None:
            raise ConfigError(f"rollout.workers.interpreter: {worker.interpreter} does not run: {fault}")
        if outgrown is not None:
            reason = self._memory_error(outgrown)
        worker.exit_reason = reason
        self.restarts += 1
        if cannot_start:
            raise ConfigError(f"an environment worker cannot start: {reason}")
        blamed = worker.pending[0][0] if worker.pending else None
        waiting = {slot.index for slot, _, _ in worker.pending} | {index for index, _, _ in worker.outbox}
        for slot in worker.slots:
            if slot.episode is None or slot.borrowed:
                continue
            self._slot_of[slot.episode] = None
            if slot.index in waiting:
                what = reason if slot is blamed else f"its worker died: {reason}"
                stop = Stop(StopReason.WORKER_ERROR, what, bystander=slot is not blamed)
                self._ready.append((slot.episode, stop))

    def _unregister(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)

    def _stop_worker(self, worker: "_Worker") -> None:
        """Let a worker go: at once if it is at work on something, else after it has closed what it holds."""
        self._unregister(worker)
        if worker.pending:
            worker.kill()
        else:
            worker.close_requests()
            self._stopping.append(worker)

    def _reap(self, until: float) -> None:
        """See off the workers that have gone; those that stay longer than a few seconds are killed."""
        with self._closing:
            for worker in list(self._stopping):
                if worker.process.exit_code() is not None or time.monotonic() > min(
                    until, worker.last_active + 10.0
                ):
                    worker.kill()
                    self._stopping.remove(worker)


class EnvironmentLostError(AgentRLError):
    """A worker that somebody waited for died, or was killed for being late."""


def _answer(worker: "_Worker", message: bytes) -> Answer:
    """Read an answer; one that cannot be read here is the environment's fault."""
    slot, kind, _ = worker.pending[0]
    try:
        number, found, payload = pickle.loads(message)
    except (Exception, SystemExit) as error:
        what = f"its {kind} answered what cannot be read here: {describe_error(error)}"
        if slot.borrowed:
            return slot.index, "raised", EnvironmentLostError(what)
        return slot.index, "stop", astuple(Stop(StopReason.CONTRACT, what))
    return number, found, payload


@dataclass(eq=False)
class _Slot:
    """Room for one environment in a worker."""

    worker: "_Worker"
    index: int
    has_env: bool = False
    episode: str | None = None
    borrowed: bool = False


@dataclass(eq=False)
class _Worker:
    """One process, and what it owes."""

    process: ProcessTree
    interpreter: str
    socket: socket.socket
    log: IO[bytes]
    slots: list[_Slot] = field(default_factory=list)
    buffer: bytearray = field(default_factory=bytearray)
    outbox: list[Request] = field(default_factory=list)
    pending: deque[tuple[_Slot, str, float]] = field(default_factory=deque)
    last_active: float = field(default_factory=time.monotonic)
    episodes_played: int = 0
    retiring: bool = False
    exit_reason: str = ""
    memory_checked: float = 0.0
    ready: bool = False

    @classmethod
    def start(cls, make: bytes, slots: int, interpreter: str | None, megabytes: float | None) -> "_Worker":
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_TIMEOUT)
        log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the worker
        variables = {"OMP_NUM_THREADS": "1", **os.environ}
        if interpreter is None:
            # What this process can import, a script's own folder included, its workers can.
            variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        python = interpreter or sys.executable
        command = [python, "-P", "-m", "agentrl.rollout.worker", str(theirs.fileno())]
        if megabytes is not None:
            command.append(str(megabytes))
        try:
            process = ProcessTree(command, variables, [theirs.fileno()], log, megabytes)
        except OSError:
            ours.close()
            log.close()
            raise
        finally:
            theirs.close()
        worker = cls(process, python, ours, log)
        worker.slots = [_Slot(worker, index) for index in range(slots)]
        with suppress(OSError):  # if it is dead already, the first answer that is missed tells
            ours.sendall(pack(make))
        return worker

    @property
    def deadline(self) -> float:
        return self.last_active + self.pending[0][2]

    @property
    def free(self) -> list[_Slot]:
        return [slot for slot in self.slots if slot.episode is None]

    @property
    def busy(self) -> int:
        return sum(slot.episode is not None for slot in self.slots)

    def megabytes(self) -> float:
        """Resident memory of the process and its children, looked at now and then."""
        now = time.monotonic()
        if now - self.memory_checked < _MEMORY_CHECK_INTERVAL:
            return 0.0
        self.memory_checked = now
        total = 0
        with suppress(psutil.Error):
            for each in psutil.Process(self.process.supervisor).children(recursive=True):
                with suppress(psutil.Error):
                    total += each.memory_info().rss
        return total / 2**20

    def close_requests(self) -> None:
        """Say that there is no more to do."""
        self.last_active = time.monotonic()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End the process and what it started, whatever they are doing."""
        self.process.kill()
        self.socket.close()
        self.log.close()

    def crash_log(self) -> str:
        """How the process ended, and what it printed last."""
        until = time.monotonic() + 2.0
        while (ended := self.process.exit_code()) is None and time.monotonic() < until:
            time.sleep(0.005)
        if ended is None:
            how = "its worker hung up"
        elif ended >= 0:
            how = f"its worker exited with {ended}"
        else:
            how = f"its worker was killed by {signal.Signals(-ended).name}"
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - _CRASH_LOG_CHARS))
        printed = self.log.read().decode(errors="replace").strip()
        return f"{how}; its last words: {printed}" if printed else how
