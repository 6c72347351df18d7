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
from agentrl.rollout.keeper import Kept
from agentrl.rollout.play import EnvironmentCall, Step, Stop, Transition
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.worker import Answer, CallTimes, Request, pack, unpack

_LAST_WORDS = 600  # characters of a dead worker's output that go into the error
_IN_THE_MIDDLE = 1.5  # times `recycle_megabytes`: more is not waited for until the episodes have ended
_WEIGHED_EVERY = 1.0  # seconds
_SEND_TIMEOUT = 30.0  # seconds; an idle worker reads at once


class ProcessEnvironments(Environments):
    """Environments in worker processes.

    Args:
        make: makes an environment; sent to the workers, so a function or class of an importable module, an
            `agentrl.env.Factory`, or what cloudpickle can send by value.
        places: episodes at a time.
        config: number of workers, deadlines, recycling.
    """

    def __init__(self, make: Make, places: int, config: WorkersConfig | None = None) -> None:
        self._config = config or WorkersConfig()
        count = min(self._config.count or os.cpu_count() or 1, places)
        each = self._config.environments or -(-places // count)
        self.places = min(places, count * each)
        self._count, self._each = count, each
        self._make = cloudpickle.dumps(make)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._leaving: list[_Worker] = []
        self._closing = threading.RLock()  # who plays in a thread may close at the same time as its owner
        self._where: dict[str, _Place | None] = {}  # None: its worker is gone
        self._backlog: deque[tuple[str, EnvironmentCall]] = deque()
        self._ready: deque[Answered] = deque()
        self._shunned: dict[str, _Worker] = {}  # where an episode failed: it is tried elsewhere
        self._told: dict[_Place, Answer] = {}  # answers to whoever borrowed the place
        self._ever_started = False

    # What the collector calls.

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        place = self._where.get(episode)
        if place is not None:
            self._call(place, effect)
        elif episode in self._where:
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
        self._seat_waiting()
        self._pump(0.0)
        while wait and not self._ready and any(worker.owed for worker in self._workers):
            if (left := until - time.monotonic()) <= 0:
                break
            self._pump(left)
            self._seat_waiting()
        answers = list(self._ready)
        self._ready.clear()
        return answers

    def release(self, episode: str, *, broken: bool = False) -> None:
        place = self._where.pop(episode, None)
        if place is None:
            return
        worker = place.worker
        worker.finished += 1
        self._vacate(place, broken)
        if broken:
            self._shunned[episode] = worker
        worker.retiring = worker.retiring or self._is_worn(worker)
        if worker.retiring and not worker.busy:
            self.recycled += 1
            self._dismiss(worker)

    def _vacate(self, place: "_Place", broken: bool) -> None:
        place.episode = None
        if broken and place.made:
            place.made = False
            self._request(place, "discard")

    def _is_worn(self, worker: "_Worker") -> bool:
        episodes, megabytes = self._config.recycle_episodes, self._config.recycle_megabytes
        if episodes is not None and worker.finished >= episodes:
            return True
        return megabytes is not None and worker.megabytes() > megabytes

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        with self._borrowed() as place:
            yield cast(TextGym, RemoteEnv(lambda *asked: self._ask(place, "ask", asked)))

    @contextmanager
    def _borrowed(self) -> Iterator["_Place"]:
        place = self._free_place(None)
        if place is None:
            raise RuntimeError("every place is being played in; borrow before or after a collection")
        place.episode, place.borrowed = "", True
        broken = True
        try:
            if not place.made:
                self._ask(place, "construct", None)
                place.made = True
            yield place
            broken = False
        finally:
            if place.worker in self._workers:
                place.borrowed = False
                self._vacate(place, broken)

    def time_calls(self, tasks: Sequence[str], seed: int) -> CallTimes:
        """Time a few short episodes inside a worker."""
        with self._borrowed() as place:
            return CallTimes(*self._ask(place, "time", (list(tasks), seed)))

    def close(self) -> None:
        with self._closing:
            for worker in list(self._workers):
                self._dismiss(worker)
            self._where.clear()
            self._backlog.clear()
            self._shunned.clear()
            self._ready.clear()
            until = time.monotonic() + 10.0
            while self._leaving:
                self._bury(until)
                if self._leaving:
                    time.sleep(0.01)

    # Requests and answers.

    def _request(self, place: "_Place", kind: str, payload: Any = None) -> None:
        place.worker.outbox.append((place.index, kind, payload))

    def _call(self, place: "_Place", call: EnvironmentCall) -> None:
        self._request(place, type(call).__name__.lower(), astuple(call))

    def _seat_waiting(self) -> None:
        """Give places to the episodes that have none, starting workers while there are too few."""
        while self._backlog:
            episode, call = self._backlog[0]
            place = self._free_place(episode)
            if place is None:
                return
            self._backlog.popleft()
            self._shunned.pop(episode, None)
            place.episode = episode
            self._where[episode] = place
            if not place.made:
                self._request(place, "construct")
                place.made = True
            self._call(place, call)

    def _free_place(self, episode: str | None) -> "_Place | None":
        """A place on an idle worker, else on a new one, else on the least busy one."""
        staying = [worker for worker in self._workers if not worker.retiring]
        candidates = [worker for worker in staying if worker.free]
        elsewhere = [worker for worker in candidates if worker is not self._shunned.get(episode or "")]
        if len(staying) < self._count and all(worker.busy for worker in elsewhere):
            return self._start().places[0]
        if not candidates:
            return None
        worker = min(elsewhere or candidates, key=lambda worker: worker.busy)
        return max(worker.free, key=lambda place: place.made)

    def _start(self) -> "_Worker":
        limit = self._config.recycle_megabytes
        worker = _Worker.start(
            self._make,
            self._each,
            self._config.interpreter,
            None if limit is None else limit * _IN_THE_MIDDLE,
        )
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _pump(self, timeout: float) -> None:
        """Send what can be sent, take in what has come; wait for `timeout`, or until the next deadline."""
        for worker in list(self._workers):
            self._send(worker)
        self._bury(time.monotonic() + 10.0)
        now = time.monotonic()
        patience = min((worker.deadline - now for worker in self._workers if worker.owed), default=0.0)
        for key, _ in self._selector.select(max(0.0, min(timeout, patience))):
            worker = key.data
            if not self._receive(worker):
                self._lose(worker, worker.last_words())
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.owed and now >= worker.deadline]:
            _, kind, limit = worker.owed[0]
            self._lose(worker, overdue(kind, limit))

    def _send(self, worker: "_Worker") -> None:
        """Send a batch, unless the last one is still being answered: neither side ever waits for a reader."""
        if worker.owed or not worker.outbox:
            return
        batch, worker.outbox = worker.outbox, []
        for index, kind, _ in batch:
            worker.owed.append((worker.places[index], kind, self._limit(kind)))
        worker.since = time.monotonic()
        try:
            worker.socket.sendall(pack(batch))
        except OSError:
            self._lose(worker, worker.last_words())

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
            if not worker.greeted:
                worker.greeted = self._ever_started = True
                continue
            if not worker.owed:
                self._lose(worker, "its worker answered what it was not asked")
                return True
            worker.since = time.monotonic()
            answer = _answer(worker, message)
            if answer[1] == "outgrown":
                self._lose(worker, self._too_heavy(answer[2]))
                return True
            self._take_in(worker, answer)
        self._send(worker)
        return bool(data)

    def _too_heavy(self, megabytes: float) -> str:
        limit = self._config.recycle_megabytes or 0
        return (
            f"its worker held {megabytes:.0f} MB in the middle of an episode, more than "
            f"{limit * _IN_THE_MIDDLE:.0f} MB, that is {_IN_THE_MIDDLE:g} times "
            f"rollout.workers.recycle_megabytes={limit}"
        )

    def _take_in(self, worker: "_Worker", answer: Answer) -> None:
        place, kind, _ = worker.owed.popleft()
        _, found, payload = answer
        if kind == "discard" or found == "void":
            return
        if place.borrowed:
            self._told[place] = answer
        elif found == "refused":
            raise payload
        elif found == "transition":
            self._ready.append((cast(str, place.episode), Transition(*payload)))
        elif found == "stop":
            reason, error, _ = payload
            place.made = place.made and kind != "construct"
            self._ready.append((cast(str, place.episode), Stop(StopReason(reason), error)))

    def _ask(self, place: "_Place", kind: str, payload: Any) -> Any:
        """Request, and wait for the answer."""
        self._told.pop(place, None)
        self._request(place, kind, payload)
        while place not in self._told:
            if place.worker not in self._workers:
                raise EnvironmentLostError(f"{kind}: {place.worker.obituary}")
            self._pump(math.inf)
        _, found, answer = self._told.pop(place)
        if found in ("raised", "refused"):
            raise answer
        if found == "stop":
            raise EnvironmentLostError(f"{kind}: {answer[1]}")
        return answer

    # The life of a worker.

    def _lose(self, worker: "_Worker", reason: str) -> None:
        """Bury a worker that died or has to; whoever it owed the next answer is held responsible."""
        if worker not in self._workers:
            return
        self._forget(worker)
        ended, outgrown, fault = worker.process.ending(), worker.process.outgrown, worker.process.fault
        cannot_start = not self._ever_started and ended is not None and ended >= 0
        worker.kill()
        if fault is not None:
            raise ConfigError(f"rollout.workers.interpreter: {worker.interpreter} does not run: {fault}")
        if outgrown is not None:
            reason = self._too_heavy(outgrown)
        worker.obituary = reason
        self.restarts += 1
        if cannot_start:
            raise ConfigError(f"an environment worker cannot start: {reason}")
        blamed = worker.owed[0][0] if worker.owed else None
        waiting = {place.index for place, _, _ in worker.owed} | {index for index, _, _ in worker.outbox}
        for place in worker.places:
            if place.episode is None or place.borrowed:
                continue
            self._where[place.episode] = None
            if place.index in waiting:
                what = reason if place is blamed else f"its worker died: {reason}"
                stop = Stop(StopReason.WORKER_ERROR, what, bystander=place is not blamed)
                self._ready.append((place.episode, stop))

    def _forget(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)

    def _dismiss(self, worker: "_Worker") -> None:
        """Let a worker go: at once if it is at work on something, else after it has closed what it holds."""
        self._forget(worker)
        if worker.owed:
            worker.kill()
        else:
            worker.hang_up()
            self._leaving.append(worker)

    def _bury(self, until: float) -> None:
        """See off the workers that have gone; those that stay longer than a few seconds are killed."""
        with self._closing:
            for worker in list(self._leaving):
                if worker.process.ending() is not None or time.monotonic() > min(until, worker.since + 10.0):
                    worker.kill()
                    self._leaving.remove(worker)


class EnvironmentLostError(AgentRLError):
    """A worker that somebody waited for died, or was killed for being late."""


def _answer(worker: "_Worker", message: bytes) -> Answer:
    """Read an answer; one that cannot be read here is the environment's fault."""
    place, kind, _ = worker.owed[0]
    try:
        number, found, payload = pickle.loads(message)
    except (Exception, SystemExit) as error:
        what = f"its {kind} answered what cannot be read here: {describe_error(error)}"
        if place.borrowed:
            return place.index, "raised", EnvironmentLostError(what)
        return place.index, "stop", astuple(Stop(StopReason.CONTRACT, what))
    return number, found, payload


@dataclass(eq=False)
class _Place:
    """Room for one environment in a worker."""

    worker: "_Worker"
    index: int
    made: bool = False
    episode: str | None = None
    borrowed: bool = False


@dataclass(eq=False)
class _Worker:
    """One process, and what it owes."""

    process: Kept
    interpreter: str
    socket: socket.socket
    log: IO[bytes]
    places: list[_Place] = field(default_factory=list)
    buffer: bytearray = field(default_factory=bytearray)
    outbox: list[Request] = field(default_factory=list)
    owed: deque[tuple[_Place, str, float]] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)
    finished: int = 0
    retiring: bool = False
    obituary: str = ""
    weighed: float = 0.0
    greeted: bool = False

    @classmethod
    def start(cls, make: bytes, places: int, interpreter: str | None, megabytes: float | None) -> "_Worker":
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
            process = Kept(command, variables, [theirs.fileno()], log, megabytes)
        except OSError:
            ours.close()
            log.close()
            raise
        finally:
            theirs.close()
        worker = cls(process, python, ours, log)
        worker.places = [_Place(worker, index) for index in range(places)]
        with suppress(OSError):  # if it is dead already, the first answer that is missed tells
            ours.sendall(pack(make))
        return worker

    @property
    def deadline(self) -> float:
        return self.since + self.owed[0][2]

    @property
    def free(self) -> list[_Place]:
        return [place for place in self.places if place.episode is None]

    @property
    def busy(self) -> int:
        return sum(place.episode is not None for place in self.places)

    def megabytes(self) -> float:
        """Resident memory of the process and its children, looked at now and then."""
        now = time.monotonic()
        if now - self.weighed < _WEIGHED_EVERY:
            return 0.0
        self.weighed = now
        total = 0
        with suppress(psutil.Error):
            for each in psutil.Process(self.process.keeper).children(recursive=True):
                with suppress(psutil.Error):
                    total += each.memory_info().rss
        return total / 2**20

    def hang_up(self) -> None:
        """Say that there is no more to do."""
        self.since = time.monotonic()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End the process and what it started, whatever they are doing."""
        self.process.kill()
        self.socket.close()
        self.log.close()

    def last_words(self) -> str:
        """How the process ended, and what it printed last."""
        until = time.monotonic() + 2.0
        while (ended := self.process.ending()) is None and time.monotonic() < until:
            time.sleep(0.005)
        if ended is None:
            how = "its worker hung up"
        elif ended >= 0:
            how = f"its worker exited with {ended}"
        else:
            how = f"its worker was killed by {signal.Signals(-ended).name}"
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - _LAST_WORDS))
        printed = self.log.read().decode(errors="replace").strip()
        return f"{how}; its last words: {printed}" if printed else how
