"""Protocols of sandbox providers, their registry, and classes that help to write one.

A package offers a provider with an entry point in the group `agentrl.sandboxes`. Its name is the value of
`isolation`, and its value is a class, or another callable without arguments, that makes a `SandboxProvider`.
Scripts call `register_sandbox`, as the built-in levels do.
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

# The source of a program for `python -c`, in any Python, that a `PipedSession` can talk to.
PROGRAM = Path(notebook.__file__).read_text()


class SandboxSession(Protocol):
    """A process, or an equivalent, in which successive pieces of code share their variables."""

    def run(self, code: str) -> Execution:
        """Run code and wait for the result, within the limits; "timeout" and "killed" close the session.

        Raises:
            SandboxError: The sandbox failed, not the code.
        """

    def close(self) -> None:
        """End the session and everything that it started. May be called twice."""


class SandboxServer(Protocol):
    """Source of sessions, which can be open at the same time and cannot affect each other."""

    @property
    def alive(self) -> bool:
        """Return whether the server can start sessions; if not, another server is started."""

    def session(self) -> SandboxSession:
        """Start a session without variables.

        Raises:
            SandboxError: The session cannot start.
        """

    def close(self) -> None:
        """Stop the server and all sessions. May be called twice."""


class SandboxProvider(Protocol):
    """A way to isolate code."""

    def available(self) -> str | None:
        """Return quickly why the provider cannot work here, or None if it may."""

    def start(self, *, limits: Limits, imports: Sequence[str]) -> SandboxServer:
        """Start a server.

        Args:
            limits: The limits of every execution and session.
            imports: The modules that code can use; a provider may offer more.

        Raises:
            SandboxError: The provider does not work here.
            ConfigError: An import fails.
        """


_registered: dict[str, Callable[[], SandboxProvider]] = {}


def register_sandbox(name: str, make: Callable[[], SandboxProvider]) -> None:
    """Register a provider as a value of `isolation`.

    Args:
        name: The name, neither "auto" nor "none".
        make: A class, or another callable without arguments, that makes the provider.

    Raises:
        ConfigError: The name is taken.
    """
    if name in ("auto", "none") or _registered.get(name, make) is not make:
        raise ConfigError(f"sandbox {name!r} is registered already")
    _registered[name] = make


def sandbox_names() -> list[str]:
    """Return the names of all providers: the registered ones in order, then those of entry points."""
    return list(dict.fromkeys([*_registered, *sorted(entry.name for entry in entry_points(group=GROUP))]))


def provider(name: str) -> SandboxProvider:
    """Make the provider with the given name.

    Raises:
        ConfigError: The name is unknown, or its entry point cannot be loaded.
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
        except (Exception, SystemExit) as error:  # a module that calls exit() must not end the process
            raise ConfigError(f"sandbox {name!r} ({offered[0].value}): {describe_error(error)}") from error
    return _registered[name]()


class PipedSession:
    """Session in a command that runs `PROGRAM`, with code on its standard input and answers on its output.

    Answers are not trusted: they are read up to a maximum size, until a deadline.

    Args:
        command: The command, which runs `python -c PROGRAM` in an isolated place.
        limits: The limits. This class enforces those of time and output; the command must enforce the others.
        imports: The modules to import first.
        end: A command that ends what killing the first command does not, such as a container.
        start_seconds: The time that starting and importing may take.

    Raises:
        SandboxError: The program does not answer.
        ConfigError: An import fails.
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
        first = self._execute(
            f"{code}del {', '.join({n.partition('.')[0] for n in imports})}\n" if code else "", start_seconds
        )
        if first.ended == "error":
            self.close()
            raise ConfigError(f"the sandbox's imports: {first.error}")
        if first.ended != "ok":
            raise SandboxError(f"{command[0]} runs no session: {first.error}")

    def run(self, code: str) -> Execution:
        """Run code and wait for the result, within the limits."""
        return self._execute(code, self._limits.seconds)

    def close(self) -> None:
        """Kill the program and its process group, then run the command `end`."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            os.killpg(process.pid, 9)
        process.communicate()
        if self._end:
            subprocess.run(self._end, stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def _execute(self, code: str, seconds: float) -> Execution:
        """Run code and convert failures of the program to a result."""
        if self._process is None:
            raise SandboxError("this session is closed")
        ended: Literal["ok", "error", "timeout", "killed"]
        try:
            answer = self._exchange(json.dumps({"code": code}).encode() + b"\n", seconds)
            output, error = str(answer["output"]), answer["error"] and str(answer["error"])
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
        """Send a line and read the line that answers it, within `seconds`."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        stdin, stdout = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(stdin, False)
        left = memoryview(line)
        while b"\n" not in self._pending:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            readable, writable, _ = select.select([stdout], [stdin] if left else [], [], remaining)
            if writable:
                left = left[os.write(stdin, left) :]
            if readable:
                data = os.read(stdout, 1 << 16)
                if not data:
                    raise ConnectionError("it closed its output")
                self._pending += data
                if len(self._pending) > self._limits.file_mb << 20:
                    raise ConnectionError(f"it printed more than {self._limits.file_mb} MB")
        answer, self._pending = self._pending.split(b"\n", 1)
        found = json.loads(answer)
        if self._pending:
            raise ConnectionError("it sent an invalid answer")
        return dict(found)


class PipedServer:
    """Server for sessions that each start a process of their own.

    Args:
        begin: A function that starts a session.
    """

    alive = True

    def __init__(self, begin: Callable[[], SandboxSession]) -> None:
        self._begin = begin
        self._open: list[SandboxSession] = []

    def session(self) -> SandboxSession:
        """Start a session."""
        session = self._begin()
        self._open.append(session)
        return session

    def close(self) -> None:
        """Close all sessions."""
        while self._open:
            self._open.pop().close()
