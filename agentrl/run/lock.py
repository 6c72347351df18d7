"""Lock of a run's folder: only one process at a time may continue the run."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from typing_extensions import TypedDict

from agentrl.errors import CheckpointError
from agentrl.files import read_json, write_atomic

_HEARTBEAT_SECONDS = 20.0
_TIMEOUT_SECONDS = 300.0  # without a heartbeat, an owner on another machine counts as dead


class _Owner(TypedDict):
    pid: int
    host: str
    machine: str
    created: float
    started: str


class RunLock:
    """Ownership of a run's folder, from `acquire` to `release`; the lock of a dead process is replaced.

    An owner on this machine is alive if a process with its pid and start time exists. An owner on another
    machine counts as alive as long as it touches the lock file, which it does every 20 seconds.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "lock.json"
        self._held: tuple[int, int] | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            CheckpointError: If another process owns the folder, or its lock file is damaged.
        """
        with _exclusive(self._folder):
            owner = self._owner()
            if owner is not None and (why := self._alive(owner)):
                raise CheckpointError(
                    f"{self._folder}: in use by process {owner['pid']} on {owner['host']} since "
                    f"{owner['started']}; {why}"
                )
            write_atomic(self._path, json.dumps(_this_process(), indent=1))
            self._held = _identity(self._path)
        threading.Thread(target=self._heartbeat, name="lock", daemon=True).start()

    def check(self) -> None:
        """Check that this process still owns the folder.

        Raises:
            CheckpointError: If the folder was removed, replaced or taken over.
        """
        if self._held is not None and _identity(self._path) != self._held:
            self._held = None
            raise CheckpointError(
                f"{self._folder}: the run's folder, or its lock.json, was removed or replaced during the "
                "run, so nothing more is written; restore it and resume the run, or start a new one"
            )

    def release(self) -> None:
        """Release the ownership, if it is still held."""
        self._released.set()
        if self._held is not None and _identity(self._path) == self._held:
            with suppress(OSError):
                self._path.unlink()
        self._held = None

    def _owner(self) -> _Owner | None:
        if not os.path.lexists(self._path):
            return None
        remedy = f"delete it if no process works on {self._folder}"
        owner: _Owner = read_json(self._path, _Owner, remedy)
        return owner

    def _alive(self, owner: _Owner) -> str | None:
        """Return a hint on what to do about a live owner; None if the owner is dead."""
        if owner["machine"] == _machine():
            return "wait for it, or stop it" if _start_time(owner["pid"]) == owner["created"] else None
        silent = self._now() - self._path.stat().st_mtime
        if silent > _TIMEOUT_SECONDS:
            return None
        return (
            f"its last heartbeat is {max(0.0, silent):.0f} s old. Wait for it, or stop it there; after "
            f"{_TIMEOUT_SECONDS:.0f} s without one it counts as dead, or delete {self._path} if you know "
            "that it is dead"
        )

    def _now(self) -> float:
        """Return the time of the clock that stamps the folder's files, which may be another machine's."""
        probe = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def _heartbeat(self) -> None:
        while not self._released.wait(_HEARTBEAT_SECONDS):
            if _identity(self._path) != self._held:
                return
            with suppress(OSError):
                os.utime(self._path)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from reading and writing the lock meanwhile."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "machine": _machine(),
        "created": _start_time(pid),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _machine() -> str:
    """Identify the scope in which a pid is unique: the host, its boot and the container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_time(pid: int) -> float | None:
    """Return the start time of a process, which tells it from a later one of its pid; None if it ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
