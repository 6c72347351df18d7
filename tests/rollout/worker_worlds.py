"""Environments that misbehave in every way a process can, on the task that is named after it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shelves import Shelves

from agentrl.errors import ConfigError


class Corridor(Shelves):
    """Tasks are "3", or "3 trouble": the trouble comes with the second step of every attempt.

    Args:
        notes: folder where each reset leaves a file, so that a test can count them.
    """

    splits = ("train",)

    def __init__(self, notes: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.notes = notes

    def tasks(self, split: str) -> list[str]:
        return [str(n) for n in range(1, 9)]

    def task_hash(self, task: str) -> str:
        return f"{int(task):064x}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        number, _, self.trouble = (options or {}).get("task", "3").partition(" ")
        if self.notes is not None:
            name = f"{self.trouble or number}-{time.time_ns()}-{os.getpid()}"
            (Path(self.notes) / name).touch()
        if self.trouble == "hang in reset":
            time.sleep(3600)
        return super().reset(seed=seed, options={"task": number})

    def step(self, action: str) -> Any:
        if self.trouble and self.steps == 1:
            self.misbehave()
        return super().step(action)

    def misbehave(self) -> None:
        match self.trouble:
            case "exit":
                print("the last thing I say", flush=True)
                os._exit(3)
            case "leave":
                sys.exit(4)
            case "segfault":
                ctypes.string_at(0)
            case "kill":
                os.kill(os.getpid(), 9)
            case "hang":
                time.sleep(3600)
            case "hang without yielding":
                ctypes.PyDLL(None).sleep(3600)  # keeps the interpreter's lock
            case "close everything":
                os.closerange(0, 4096)
            case "raise":
                raise ValueError("no such shelf")
            case "interrupt":
                raise KeyboardInterrupt("not by a key")
            case "fork":
                os.fork()
            case "fork in C":
                ctypes.CDLL(None).fork()
            case "fork a copy that stays":
                if os.fork() == 0:
                    time.sleep(3600)
            case "fork and leave":
                if os.fork():
                    os._exit(3)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill the parent":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(3600)
            case "grow":
                self.held = b"x" * (400 << 20)
            case "once":
                marker = Path(self.notes or "") / "stumbled"
                if not marker.exists():
                    marker.touch()
                    os._exit(5)

    def info(self) -> dict[str, Any]:
        if getattr(self, "trouble", "") == "unpicklable" and self.steps == 1:
            return super().info() | {"handle": lambda: None}
        if getattr(self, "trouble", "") == "unreadable" and self.steps == 1:
            return super().info() | {"handle": Unreadable()}
        if getattr(self, "trouble", "") == "huge" and self.steps == 1:
            return super().info() | {"map": [b"x" * (200 << 20)]}
        return super().info()


class Unreadable:
    """Can be pickled, and not be unpickled."""

    def __reduce__(self) -> Any:
        return sys.exit, (0,)


class Daemons(Corridor):
    """Starts, with the second step, a process that leaves its session and forgets its variables.

    Its number is left in a file of `notes`.
    """

    def step(self, action: str) -> Any:
        if self.steps == 1:
            script = f"echo $$ > {self.notes}/pid.partial; mv {self.notes}/pid.partial {self.notes}/pid"
            command = ["setsid", "-f", "/bin/sh", "-c", f"{script}; exec sleep 3600"]
            subprocess.run(command, env={}, check=True)
            while not (Path(self.notes or "") / "pid").exists():
                time.sleep(0.01)
        return super().step(action)


class Engine(Corridor):
    """Each step asks a child process, as an environment around a server does."""

    child: "subprocess.Popen[str] | None" = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self.child is None:
            self.child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        assert self.child is not None
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        time.sleep(0.01)
        self.child.stdin.write("ping\n")
        self.child.stdin.flush()
        if self.child.stdout.readline() != "ping\n":
            raise ConnectionError("the engine is gone")
        return super().step(action)

    def close(self) -> None:
        super().close()
        if self.child is not None:
            self.child.kill()
            self.child.communicate()


class SnapshotCorridor(Corridor):
    """Corridor with snapshots of size `weight`; a note is written for each that is restored."""

    weight = 10

    def snapshot(self) -> Any:
        return self.trouble, self.task, self.left, self.steps, b"x" * self.weight

    def restore(self, snapshot: Any) -> None:
        self.trouble, self.task, self.left, self.steps, _ = snapshot
        if self.notes is not None:
            (Path(self.notes) / f"restored-{self.steps}-{time.time_ns()}-{os.getpid()}").touch()
        if self.trouble == "exit in restore":
            os._exit(7)
        if self.trouble == "hang in restore":
            time.sleep(3600)


class Heaped(SnapshotCorridor):
    weight = 1 << 16


class Stuck(SnapshotCorridor):
    """Corridor whose snapshots cannot be pickled."""

    def snapshot(self) -> Any:
        return *super().snapshot()[:4], lambda: None


class Sleepy(Corridor):
    """Steps that wait."""

    thread_safe = False

    def step(self, action: str) -> Any:
        time.sleep(0.01)
        return super().step(action)


class Lingering(Corridor):
    """Takes so many seconds to close."""

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seconds = seconds

    def close(self) -> None:
        time.sleep(self.seconds)
        super().close()


class SleepyAndSafe(Sleepy):
    thread_safe = True


class Heavy(Sleepy):
    heavy = True


class Unmakeable(Corridor):
    def __init__(self, why: str) -> None:
        if why == "hang":
            time.sleep(3600)
        if why == "exit":
            os._exit(6)
        if why == "refuse":
            raise ConfigError("argument of test/Unmakeable-v0 'dors' is unknown")
        raise ConnectionError("refused")


class Growing(Corridor):
    """Holds 40 MB more after every reset, for all that live in the process."""

    held: list[bytes] = []  # noqa: RUF012

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.held.append(b"x" * (40 << 20))
        return super().reset(seed=seed, options=options)


class Whereabouts(Corridor):
    """Corridor whose observation is the path of its Python."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        _, info = super().reset(seed=seed, options=options)
        return sys.prefix, info
