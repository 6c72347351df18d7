"""One worker process as the pool in `workers` sees it: its socket, its pending requests and its end."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

import psutil

from agentrl.rollout.process_tree import ProcessTree
from agentrl.rollout.worker import Request, pack

_CRASH_LOG_CHARS = 600  # characters of a dead worker's output that go into the error
_MEMORY_CHECK_INTERVAL = 1.0  # seconds
_SEND_TIMEOUT = 30.0  # seconds; an idle worker reads at once


@dataclass(eq=False)
class Slot:
    """Room for one environment in a worker."""

    worker: "WorkerProcess"
    index: int
    has_env: bool = False
    episode: str | None = None
    borrowed: bool = False


@dataclass(eq=False)
class WorkerProcess:
    """A worker process and the state of the exchange with it.

    Args:
        process: The process with all its descendants.
        interpreter: The Python that it runs in.
        socket: The connection to it.
        log: A file with what it has printed.
        slots: Room for its environments.
        buffer: What was received of the next message.
        outbox: The requests that are not sent yet.
        pending: The requests without an answer so far: slot, kind and time limit in seconds.
        last_active: When it was last sent a batch or had answered.
        episodes_played: The number of episodes that have ended in it.
        retiring: Whether it gets no more episodes and is replaced.
        exit_reason: Why it was given up.
        memory_checked: When its memory was last looked at.
        ready: Whether it has started and reported so.
    """

    process: ProcessTree
    interpreter: str
    socket: socket.socket
    log: IO[bytes]
    slots: list[Slot] = field(default_factory=list)
    buffer: bytearray = field(default_factory=bytearray)
    outbox: list[Request] = field(default_factory=list)
    pending: deque[tuple[Slot, str, float]] = field(default_factory=deque)
    last_active: float = field(default_factory=time.monotonic)
    episodes_played: int = 0
    retiring: bool = False
    exit_reason: str = ""
    memory_checked: float = 0.0
    ready: bool = False

    @classmethod
    def start(
        cls, make: bytes, slots: int, interpreter: str | None, megabytes: float | None
    ) -> "WorkerProcess":
        """Start a process and send it the function that makes its environments.

        Args:
            make: The pickled function.
            slots: The number of environments that it may hold.
            interpreter: The Python that it runs in; None for this one.
            megabytes: The memory at which it is killed, with its descendants; None for no limit.

        Raises:
            OSError: No process can be started.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_TIMEOUT)
        log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the worker
        variables = {"OMP_NUM_THREADS": "1", **os.environ}
        if interpreter is None:
            # A worker can import what this process can, the folder of a script included.
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
        worker.slots = [Slot(worker, index) for index in range(slots)]
        with suppress(OSError):  # a worker that has died already is noticed at its first missing answer
            ours.sendall(pack(make))
        return worker

    @property
    def deadline(self) -> float:
        """Return the time by which the next answer must have come."""
        return self.last_active + self.pending[0][2]

    @property
    def free(self) -> list[Slot]:
        """Return the slots in which no episode is played."""
        return [slot for slot in self.slots if slot.episode is None]

    @property
    def busy(self) -> int:
        """Return the number of slots in use."""
        return sum(slot.episode is not None for slot in self.slots)

    def megabytes(self) -> float:
        """Return the resident memory of the process and its descendants in MB; 0 if measured a moment ago."""
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
        """Let the process know that there are no more requests, so that it closes its environments."""
        self.last_active = time.monotonic()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Kill the process and its descendants."""
        self.process.kill()
        self.socket.close()
        self.log.close()

    def crash_log(self) -> str:
        """Return how the process ended and the end of its output."""
        until = time.monotonic() + 2.0
        while (ended := self.process.exit_code()) is None and time.monotonic() < until:
            time.sleep(0.005)
        if ended is None:
            how = "its worker closed the connection"
        elif ended >= 0:
            how = f"its worker exited with {ended}"
        else:
            how = f"its worker was killed by {signal.Signals(-ended).name}"
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - _CRASH_LOG_CHARS))
        printed = self.log.read().decode(errors="replace").strip()
        return f"{how}; its last output: {printed}" if printed else how
