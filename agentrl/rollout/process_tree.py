"""The process between this one and a worker: whatever the worker started ends with it, however it ends.

Processes that a worker leaves behind become children of its keeper (Linux), those in sessions of their own as
well, so that none can get away. The keeper runs this file as a program, without site-packages, in a few
megabytes; `ProcessTree` is the other side.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import IO

_GRACE = 5.0  # seconds that a worker has to close what it holds when whoever started it has died
_CHECK_INTERVAL = 0.2  # seconds between two looks at the memory of processes that are known
_SEARCH_FRACTION = 100  # at most one part in so many of the time is spent on searching for them
_END_SECONDS = 5.0  # a process that cannot be killed for so long (another user's, a broken disk's) is left
_ANSWER_SECONDS = 15.0
_CHILD_SUBREAPER, _DEATH_SIGNAL = 36, 1


class ProcessTree:
    """A running process, and all that it will ever start.

    Args:
        command: to run, in a session of its own.
        environment: variables.
        handed: descriptors that it inherits.
        log: where it prints to.
        megabytes: that it may hold with all it started; None for any number.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        handed: Sequence[int],
        log: IO[bytes],
        megabytes: float | None = None,
    ) -> None:
        life, self._life = os.pipe()
        self._report, report = os.pipe()
        os.set_blocking(self._report, False)
        said = [str(life), str(report), str(megabytes or 0)]
        try:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *said, *command],
                pass_fds=(life, report, *handed),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        except OSError:
            self._close(self._life, self._report)
            raise
        finally:
            self._close(life, report)
        self._reports: dict[str, str] = {}
        self._pending = b""

    @property
    def pid(self) -> int:
        """Number of the process itself; 0 if it could not be started."""
        self._wait_for(("pid", "failed", "ended"))
        return int(self._reports.get("pid", 0))

    @property
    def supervisor(self) -> int:
        """Number of the process whose descendants are all that is kept."""
        return self._supervisor.pid

    @property
    def start_error(self) -> str | None:
        """Why the process could not be started, if it could not."""
        self._read_reports()
        return self._reports.get("failed")

    @property
    def memory_exceeded(self) -> float | None:
        """Megabytes that it held when it was ended for them."""
        self._read_reports()
        return float(self._reports["outgrown"]) if "outgrown" in self._reports else None

    def exit_code(self) -> int | None:
        """Return the exit code of the process, the negative number of the signal that ended it, or None."""
        self._read_reports()
        if "ended" in self._reports:
            return int(self._reports["ended"])
        if self._supervisor.poll() is None:
            return None
        self._read_reports()  # its last words may have come in between
        return int(self._reports.get("ended", -signal.SIGKILL))

    def kill(self) -> None:
        """End the process and all that it started, and wait until they are gone."""
        if self._life >= 0:
            with suppress(OSError):
                os.write(self._life, b"k")
        try:
            self._supervisor.wait(_ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._read_reports()
            for group in filter(None, (int(self._reports.get("pid", 0)), self._supervisor.pid)):
                with suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
            self._supervisor.wait()
        if self._life >= 0:
            self._read_reports()
            self._close(self._life, self._report)
            self._life = self._report = -1

    def _wait_for(self, wanted: Iterable[str]) -> None:
        until = time.monotonic() + _ANSWER_SECONDS
        while not any(each in self._reports for each in wanted) and (left := until - time.monotonic()) > 0:
            if self._report < 0 or self._supervisor.poll() is not None:
                self._read_reports()
                return
            select.select([self._report], [], [], min(left, 0.5))
            self._read_reports()

    def _read_reports(self) -> None:
        if self._report < 0:
            return
        with suppress(BlockingIOError):
            while data := os.read(self._report, 4096):
                self._pending += data
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            kind, _, value = line.decode().partition(" ")
            self._reports[kind] = value

    @staticmethod
    def _close(*descriptors: int) -> None:
        for each in descriptors:
            os.close(each)


class _Supervisor:
    """Starts the process, waits for its end, its time or its owner's, and clears up after it."""

    def __init__(self, life: int, report: int, megabytes: float, command: Sequence[str]) -> None:
        self._life, self._report, self._megabytes = life, report, megabytes
        for each in (life, report):
            os.set_inheritable(each, False)
        _ask_kernel(_CHILD_SUBREAPER, 1)
        self._wake, woken = os.pipe()
        for each in (self._wake, woken):
            os.set_blocking(each, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self._known: set[int] = set()
        self._search_at = 0.0
        self._exit_code: int | None = None
        self._pid = self._start(command)
        self._report_line("pid", self._pid)

    def _start(self, command: Sequence[str]) -> int:
        supervisor, pid = os.getpid(), os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _ask_kernel(_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() == supervisor:  # else it died before it could be followed
                os.execvp(command[0], list(command))
        except OSError as error:
            self._report_line("failed", error.strerror)
        finally:
            os._exit(127)

    def keep(self) -> None:
        """Wait until the process ends or has to."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._life, select.POLLIN)
        until = float("inf")
        while self._exit_code is None and (now := time.monotonic()) < until:
            timeout = _CHECK_INTERVAL if self._megabytes else 60.0
            for descriptor, _ in poller.poll(1000 * max(0.0, min(timeout, until - now))):
                if descriptor == self._wake:
                    os.read(self._wake, 4096)
                elif os.read(self._life, 1):
                    until = 0.0
                else:  # its owner is gone without a word
                    poller.unregister(self._life)
                    until = time.monotonic() + _GRACE
            self._reap()
            if self._exit_code is None and self._megabytes and (held := self._memory()) > self._megabytes:
                self._report_line("outgrown", f"{held:.0f}")
                until = 0.0
        if self._exit_code is not None:
            self._report_line("ended", self._exit_code)
        self._kill_all()

    def _reap(self) -> bool:
        """Take in who has ended; False when nobody is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return True
                if pid == self._pid:
                    self._exit_code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return False

    def _memory(self) -> float:
        """Megabytes of resident memory."""
        now = time.monotonic()
        if now >= self._search_at:
            self._known = _descendants(os.getpid())
            self._search_at = now + max(1.0, _SEARCH_FRACTION * (time.monotonic() - now))
        return sum(map(_resident, self._known | {self._pid})) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _kill_all(self) -> None:
        """Kill until there is nobody left: first stop them all, so that nobody starts others meanwhile."""
        until = time.monotonic() + _END_SECONDS
        known = self._exit_code is not None
        while True:
            if self._exit_code is None:  # its number is its own until it has been reaped
                with suppress(OSError):
                    os.killpg(self._pid, signal.SIGKILL)
            stopped: set[int] = set()
            while found := _descendants(os.getpid()) - stopped:
                _send(signal.SIGSTOP, found)
                stopped |= found
            _send(signal.SIGKILL, stopped)
            if not self._reap() or time.monotonic() > until:
                break
            time.sleep(0.002)
        if not known and self._exit_code is not None:
            self._report_line("ended", self._exit_code)

    def _report_line(self, kind: str, value: object) -> None:
        with suppress(OSError):
            os.write(self._report, f"{kind} {value}\n".encode())


def _ask_kernel(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, *(ctypes.c_ulong(part) for part in (value, 0, 0, 0)))


def _send(number: int, processes: Iterable[int]) -> None:
    for pid in processes:
        with suppress(OSError):
            os.kill(pid, number)


def _descendants(pid: int) -> set[int]:
    """Processes that one has started, and those that these have."""
    children: dict[int, list[int]] = {}
    with suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    front = [pid]
    while front:
        new = set(children.get(front.pop(), ())) - found
        found |= new
        front += new
    return found


def _resident(pid: int) -> int:
    """Pages of memory that a process holds."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb") as statm:
        return int(statm.read().split()[1])
    return 0


if __name__ == "__main__":
    life, report, megabytes, *command = sys.argv[1:]
    _Supervisor(int(life), int(report), float(megabytes), command).keep()
    os._exit(0)
