"""One process at a time goes on with a run: its folder says who that is."""

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

_HEARTBEAT_SECONDS = 20.0  # seconds between two signs of life
_TIMEOUT_SECONDS = 300.0  # seconds after which an owner that cannot be asked counts as dead


class _Owner(TypedDict):
    pid: int
    host: str
    machine: str
    created: float
    started: str


class RunLock:
    """Ownership of a run's folder, from `acquire` to `release`; a killed owner's is taken over.

    An owner on this machine is asked for: it lives if there is a process of its pid that began when it did.
    One elsewhere is believed to live while it touches the file, which it does every 20 seconds.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "lock.json"
        self._held: tuple[int, int] | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            CheckpointError: when another process is, or the file that says so is damaged.
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
        """Refuse to go on in a folder that was removed, replaced or taken over.

        Raises:
            CheckpointError: when it was.
        """
        if self._held is not None and _identity(self._path) != self._held:
            self._held = None
            raise CheckpointError(
                f"{self._folder}: the run's folder, or its lock.json, was removed or replaced while the run "
                "went on, so nothing more is written; put it back and resume it, or start a new run"
            )

    def release(self) -> None:
        """Give up ownership, if it is still held."""
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
        """What to do about an owner that lives; None where it does not."""
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
        """By the clock that stamps the folder's files, which may be another machine's."""
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
    """Let one process of a machine look at the lock and write it."""
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
    """Within which a pid means one process: a host since it was booted, and the container on it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_time(pid: int) -> float | None:
    """When a process began, which tells it from a later one of the same pid; None for one that ended."""
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
