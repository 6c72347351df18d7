"""A process and all its descendants: whatever the process starts ends with it, however it ends.

A supervisor process stands between this process and the supervised one. On Linux it is the subreaper of all
descendants, including those in sessions of their own, so that none of them can escape. It runs this file as a
program, without site-packages, in a few megabytes; `ProcessTree` is the interface to it.
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

_GRACE = 5.0  # seconds for the process to end by itself after its owner has died
_CHECK_INTERVAL = 0.2  # seconds between two measurements of the memory of known processes
_SEARCH_FACTOR = 100  # the next search for descendants starts after 100 times the length of the last one
_END_SECONDS = (
    5.0  # a process that survives SIGKILL for longer (blocked in the kernel, another user's) is left
)
_ANSWER_SECONDS = 15.0
_CHILD_SUBREAPER, _DEATH_SIGNAL = 36, 1


class ProcessTree:
    """A running process with all its descendants.

    Args:
        command: The command to run, in a session of its own.
        environment: The environment variables.
        inherited: The file descriptors that it inherits.
        log: The file for its standard output and error.
        megabytes: The resident memory of process and descendants at which they are killed; None for no limit.

    Raises:
        OSError: No process can be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        inherited: Sequence[int],
        log: IO[bytes],
        megabytes: float | None = None,
    ) -> None:
        life, self._life = os.pipe()
        self._report, report = os.pipe()
        os.set_blocking(self._report, False)
        arguments = [str(life), str(report), str(megabytes or 0)]
        try:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *arguments, *command],
                pass_fds=(life, report, *inherited),
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
        """Return the id of the process itself; 0 if it could not be started."""
        self._wait_for(("pid", "failed", "ended"))
        return int(self._reports.get("pid", 0))

    @property
    def supervisor(self) -> int:
        """Return the id of the supervisor, of which the process and its descendants are descendants."""
        return self._supervisor.pid

    @property
    def start_error(self) -> str | None:
        """Return why the process could not be started; None if it was."""
        self._read_reports()
        return self._reports.get("failed")

    @property
    def memory_exceeded(self) -> float | None:
        """Return the memory in MB for which it was killed; None if it was not killed for its memory."""
        self._read_reports()
        return float(self._reports["outgrown"]) if "outgrown" in self._reports else None

    def exit_code(self) -> int | None:
        """Return the exit code, negative for a signal as in `subprocess`; None while the process runs."""
        self._read_reports()
        if "ended" in self._reports:
            return int(self._reports["ended"])
        if self._supervisor.poll() is None:
            return None
        self._read_reports()  # the last report may have come in between
        return int(self._reports.get("ended", -signal.SIGKILL))

    def kill(self) -> None:
        """Kill the process and its descendants, and wait until they have ended."""
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
    """Program between owner and process: it starts the process, supervises it and kills what it leaves."""

    def __init__(self, life: int, report: int, megabytes: float, command: Sequence[str]) -> None:
        self._life, self._report, self._megabytes = life, report, megabytes
        for each in (life, report):
            os.set_inheritable(each, False)
        _set_process_option(_CHILD_SUBREAPER, 1)
        self._wake, woken = os.pipe()
        for each in (self._wake, woken):
            os.set_blocking(each, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self._known: set[int] = set()
        self._search_at = 0.0
        self._exit_code: int | None = None
        self._pid = self._start(command)
        self._write_report("pid", self._pid)

    def _start(self, command: Sequence[str]) -> int:
        supervisor, pid = os.getpid(), os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _set_process_option(_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() == supervisor:  # else the supervisor died before the signal was set
                os.execvp(command[0], list(command))
        except OSError as error:
            self._write_report("failed", error.strerror)
        finally:
            os._exit(127)

    def run(self) -> None:
        """Wait until the process ends or must be killed, and kill all that is left."""
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
                else:  # the owner died: its end of the pipe is closed
                    poller.unregister(self._life)
                    until = time.monotonic() + _GRACE
            self._reap()
            if self._exit_code is None and self._megabytes and (memory := self._memory()) > self._megabytes:
                self._write_report("outgrown", f"{memory:.0f}")
                until = 0.0
        if self._exit_code is not None:
            self._write_report("ended", self._exit_code)
        self._kill_all()

    def _reap(self) -> bool:
        """Reap the children that have ended; return whether any are left."""
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
        """Return the resident memory of the process and its known descendants, in MB."""
        now = time.monotonic()
        if now >= self._search_at:
            self._known = _descendants(os.getpid())
            self._search_at = now + max(1.0, _SEARCH_FACTOR * (time.monotonic() - now))
        return sum(map(_resident, self._known | {self._pid})) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _kill_all(self) -> None:
        """Kill all descendants; they are stopped first, so that none starts another in the meantime."""
        until = time.monotonic() + _END_SECONDS
        reported = self._exit_code is not None
        while True:
            if self._exit_code is None:  # until it is reaped, no other process can have its id
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
        if not reported and self._exit_code is not None:
            self._write_report("ended", self._exit_code)

    def _write_report(self, kind: str, value: object) -> None:
        with suppress(OSError):
            os.write(self._report, f"{kind} {value}\n".encode())


def _set_process_option(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, *(ctypes.c_ulong(part) for part in (value, 0, 0, 0)))


def _send(number: int, processes: Iterable[int]) -> None:
    for pid in processes:
        with suppress(OSError):
            os.kill(pid, number)


def _descendants(pid: int) -> set[int]:
    """Return the ids of all descendants of a process."""
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
    """Return the resident memory of a process, in pages; 0 if it is gone."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb") as statm:
        return int(statm.read().split()[1])
    return 0


if __name__ == "__main__":
    life, report, megabytes, *command = sys.argv[1:]
    _Supervisor(int(life), int(report), float(megabytes), command).run()
    os._exit(0)
