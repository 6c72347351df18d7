"""What isolates model-written code: a protocol, those who keep to it by name, and help for writing one.

A distribution offers one with an entry point in the group `agentrl.sandboxes`: its name is what `isolation`
says, and its value a class, or another callable without arguments that returns a `SandboxProvider`. Ours
are registered by `register_sandbox`, as a script may do.
"""

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol

from agentrl.env.containment import describe_error
from agentrl.env.names import unknown
from agentrl.env.sandbox import notebook
from agentrl.env.sandbox.process import Execution, Limits, SandboxError, truncate_middle
from agentrl.errors import ConfigError

GROUP = "agentrl.sandboxes"

# The text of a program for `python -c` that a `PipedSession` can talk to, in any Python.
PROGRAM = Path(notebook.__file__).read_text()


class SandboxSession(Protocol):
    """A process, or what stands for one, in which pieces of code share their variables."""

    def run(self, code: str) -> Execution:
        """Run code and wait for it, no longer than its limits; after "timeout" and "killed" it is closed.

        Raises:
            SandboxError: the sandbox failed, not the code.
        """

    def close(self) -> None:
        """End it and everything that it started. Can be called twice."""


class SandboxServer(Protocol):
    """Gives sessions; they can be open side by side, and cannot reach each other."""

    @property
    def alive(self) -> bool:
        """Whether it can give one; another server is started in its place otherwise."""

    def session(self) -> SandboxSession:
        """Begin one with no variables.

        Raises:
            SandboxError: there is none to be had.
        """

    def close(self) -> None:
        """End it and all sessions. Can be called twice."""


class SandboxProvider(Protocol):
    """A way to isolate code."""

    def available(self) -> str | None:
        """Return None where it may work here, else the reason why it cannot; quickly."""

    def start(self, *, limits: Limits, imports: Sequence[str]) -> SandboxServer:
        """Start a server.

        Args:
            limits: of every execution and session.
            imports: modules that code can use; beyond them a provider may offer what it likes.

        Raises:
            SandboxError: it does not work here.
            ConfigError: one of the imports is not there.
        """


_registered: dict[str, Callable[[], SandboxProvider]] = {}


def register_sandbox(name: str, make: Callable[[], SandboxProvider]) -> None:
    """Let `isolation` name a provider.

    Args:
        name: neither "auto" nor "none".
        make: a class, or another callable without arguments.

    Raises:
        ConfigError: the name is taken.
    """
    if name in ("auto", "none") or _registered.get(name, make) is not make:
        raise ConfigError(f"sandbox {name!r} is registered already")
    _registered[name] = make


def sandbox_names() -> list[str]:
    """List what `isolation` may name: the registered ones in their order, then those of entry points."""
    return list(dict.fromkeys([*_registered, *sorted(entry.name for entry in entry_points(group=GROUP))]))


def provider(name: str) -> SandboxProvider:
    """Make the provider of a name.

    Raises:
        ConfigError: nobody offers it, or what offers it cannot be loaded.
    """
    if name not in _registered:
        offered = [entry for entry in entry_points(group=GROUP) if entry.name == name]
        if not offered:
            raise unknown("isolation", name, ("auto", *sandbox_names(), "none"))
        if len({entry.value for entry in offered}) > 1:
            values = ", ".join(sorted(entry.value for entry in offered))
            raise ConfigError(f"sandbox {name!r} is offered more than once: {values}")
        try:
            register_sandbox(name, offered[0].load())
        except (Exception, SystemExit) as error:  # a module that exits on import must not end the process
            raise ConfigError(f"sandbox {name!r} ({offered[0].value}): {describe_error(error)}") from error
    return _registered[name]()


class PipedSession:
    """A session in a program that runs `PROGRAM`: code goes to its standard input, answers come back.

    Nothing that it answers is trusted: it is read with a cap, until a deadline.

    Args:
        command: that runs `python -c PROGRAM` where it can do no harm.
        limits: of which time, what is printed and what is kept are seen to here; the rest is the command's.
        imports: done first.
        end: a command that ends what ending the first one does not, such as a container.

    Raises:
        SandboxError: the program does not answer.
        ConfigError: one of the imports is not there.
    """

    def __init__(
        self,
        command: Sequence[str],
        limits: Limits,
        imports: Sequence[str] = (),
        end: Sequence[str] = (),
        *,
        start_seconds: float = 60.0,
    ) -> None:
        self._limits, self._end = limits, end
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._process = None
            raise SandboxError(f"{command[0]} does not run: {error.strerror}") from error
        self._pending = b""
        code = "".join(f"import {name.partition('.')[0]}, {name}\n" for name in imports)
        first = self._answered(
            f"{code}del {', '.join({n.partition('.')[0] for n in imports})}\n" if code else "", start_seconds
        )
        if first.ended == "error":
            self.close()
            raise ConfigError(f"the sandbox's imports: {first.error}")
        if first.ended != "ok":
            raise SandboxError(f"{command[0]} runs no session: {first.error}")

    def run(self, code: str) -> Execution:
        """Run code and wait for it, no longer than its limits."""
        return self._answered(code, self._limits.seconds)

    def close(self) -> None:
        """End the program and what is in its session, then call the command that ends the rest."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            os.killpg(process.pid, 9)
        process.communicate()
        if self._end:
            subprocess.run(self._end, stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def _answered(self, code: str, seconds: float) -> Execution:
        if self._process is None:
            raise SandboxError("this session is closed")
        ended: Literal["ok", "error", "timeout", "killed"]
        try:
            said = self._exchange(json.dumps({"code": code}).encode() + b"\n", seconds)
            output, error = str(said["output"]), said["error"] and str(said["error"])
            ended = "error" if error else "ok"
        except TimeoutError:
            output, ended = "", "timeout"
            error = f"took longer than {seconds:g} s; all variables are lost"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as fault:
            output, error, ended = "", f"the process ended itself ({fault}); all variables are lost", "killed"
        if ended in ("timeout", "killed"):
            self.close()
        return Execution(truncate_middle(output, self._limits.output_chars), error, ended)

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Send a line and read one, by a deadline."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        until = time.monotonic() + seconds
        asked, told = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(asked, False)
        left = memoryview(line)
        while b"\n" not in self._pending:
            patience = until - time.monotonic()
            if patience <= 0:
                raise TimeoutError
            readable, writable, _ = select.select([told], [asked] if left else [], [], patience)
            if writable:
                left = left[os.write(asked, left) :]
            if readable:
                data = os.read(told, 1 << 16)
                if not data:
                    raise ConnectionError("it hung up")
                self._pending += data
                if len(self._pending) > self._limits.file_mb << 20:
                    raise ConnectionError(f"it printed more than {self._limits.file_mb} MB")
        answer, self._pending = self._pending.split(b"\n", 1)
        found = json.loads(answer)
        if self._pending:
            raise ConnectionError("it answered nonsense")
        return dict(found)


class PipedServer:
    """A server for sessions that need none: each comes with a process of its own.

    Args:
        begin: makes a session.
    """

    alive = True

    def __init__(self, begin: Callable[[], SandboxSession]) -> None:
        self._begin = begin
        self._open: list[SandboxSession] = []

    def session(self) -> SandboxSession:
        session = self._begin()
        self._open.append(session)
        return session

    def close(self) -> None:
        while self._open:
            self._open.pop().close()
