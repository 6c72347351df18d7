"""The sandbox and its sessions, in which model-written Python runs."""

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, Self

from agentrl.env.names import unknown
from agentrl.env.sandbox.levels import Level
from agentrl.env.sandbox.process import LEVELS, Execution, Limits, SandboxError
from agentrl.env.sandbox.provider import SandboxServer, SandboxSession, provider, sandbox_names
from agentrl.errors import ConfigError

# Modules that code for mathematical problems uses; imported beforehand, so that `import` is only a look-up.
IMPORTS = (
    "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "heapq", "itertools", "json", "math", "numbers", "operator", "random", "re", "statistics",
    "string", "sys", "time", "typing",
)  # fmt: skip

_CODE_BYTES = 1 << 20


class Sandbox:
    """Sandbox that runs model-written Python in separate processes without privileges.

    A fork server, started on first use, forks a process for every session. Several sessions can be open at
    the same time, also in threads, and cannot affect each other. The levels of isolation:

    - "namespaces": no network, no visible processes, no files except the standard library, shared libraries
      and the imports, and an empty writable folder of `limits.file_mb`. A system call filter lets code
      compute, use these files and start threads, but no processes.
    - "bubblewrap": similar isolation by `bwrap`, for systems where only `bwrap` may create namespaces; no
      writing and no threads.
    - "seccomp": the system call filter alone. No file can be opened, so only `imports` can be imported.
    - "none": only limits and deadlines, for code that you would run yourself. Never chosen by "auto".

    Packages can provide other levels and define what these isolate; see
    `agentrl.env.sandbox.SandboxProvider`.

    Args:
        isolation: A level, the name of another provider, or "auto" for the first level that works here.
        require_isolation: Whether to refuse "none".
        limits: The limits of every execution and session.
        imports: The modules to import beforehand. Packages outside the standard library can be used only if
            they are listed here, which makes their files readable.

    Raises:
        ConfigError: An argument is invalid, or, at the first session, an import fails.
    """

    def __init__(
        self,
        *,
        isolation: str = "auto",
        require_isolation: bool = True,
        limits: Limits = Limits(),  # noqa: B008
        imports: Sequence[str] = IMPORTS,
    ) -> None:
        known = ("auto", *sandbox_names(), "none")
        if isolation not in known:
            raise unknown("isolation", isolation, known)
        if isolation == "none" and require_isolation:
            raise ConfigError("isolation is 'none' and require_isolation is True; change one of them")
        if isinstance(imports, str):
            raise ConfigError(f"imports is {imports!r}, wanted a list of module names")
        self.limits = limits
        self._levels = LEVELS if isolation == "auto" else (isolation,)
        self._settings: dict[str, Any] = {"limits": limits, "imports": tuple(imports)}
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._server: SandboxServer | None = None
        self._closer: weakref.finalize[[], Sandbox] | None = None

    @property
    def isolation(self) -> str:
        """Return the level of isolation in use, starting the server if necessary.

        Raises:
            SandboxError: No level works; the message gives the reason for each level.
        """
        self._running()
        return self._levels[0]

    def session(self) -> "Session":
        """Start a new process without variables.

        Raises:
            SandboxError: The sandbox cannot start, or its server died twice.
        """
        return Session(self)

    def close(self) -> None:
        """Stop the server and all sessions. A later session starts the server again."""
        with self._lock:
            if self._closer:
                self._closer()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fork(self) -> SandboxSession:
        """Start a process for a session, once more if the server died."""
        server = self._running()
        try:
            return server.session()
        except SandboxError as fault:
            if server.alive:
                raise SandboxError(f"the sandbox failed: {fault}") from fault
        return self._running().session()

    def _running(self) -> SandboxServer:
        """Return the running server, starting one if necessary."""
        if self._owner != os.getpid():  # in a forked process: the server belongs to the parent
            self._owner, self._lock, self._server = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._server and not self._server.alive and self._closer:
                self._closer()
                self._server = None
            if self._server is None:
                self._server = self._start()
                self._closer = weakref.finalize(self, self._server.close)
            return self._server

    def _start(self) -> SandboxServer:
        """Start a server with the first level that works, and keep that level."""
        reasons = []
        for level in self._levels:
            try:
                server = _launch(level, self._settings)
            except (SandboxError, OSError) as fault:
                reasons.append(f"{level}: {fault}")
            else:
                self._levels = (level,)
                return server
        if self._levels == ("none",):
            raise SandboxError(f"the sandbox cannot start: {reasons[0]}")
        raise SandboxError(
            f"model-written code cannot be isolated here: {'; '.join(reasons)}. To run it with your own "
            "privileges anyway, set isolation='none' and require_isolation=False."
        )


class Session:
    """A sandboxed process and its variables, until `close`. Use it in one thread at a time."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._child: SandboxSession | None = sandbox._fork()
        self._closed = False

    def run(self, code: str) -> Execution:
        """Run code and wait for the result, within the limits.

        Raises:
            SandboxError: The server of the sandbox died, or the session is closed.
        """
        if self._closed:
            raise SandboxError("this session is closed")
        if len(code.encode("utf-8", "replace")) > _CODE_BYTES:
            return Execution("", f"the code is longer than {_CODE_BYTES} bytes", "error")
        if self._child is None:
            self._child = self._sandbox._fork()
        kept = False
        try:
            execution = self._child.run(code)
            kept = execution.ended in ("ok", "error")
        finally:
            if not kept:
                self._drop()
        return execution

    def close(self) -> None:
        """End the process and everything that it started. May be called twice."""
        self._closed = True
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child:
            child.close()


@cache
def probe() -> dict[str, str | None]:
    """Try every level of isolation and return the reason why it does not work here, or None if it does."""
    found: dict[str, str | None] = {}
    for level in LEVELS:
        try:
            _launch(level, {"limits": Limits(), "imports": ()}).close()
            found[level] = None
        except (SandboxError, OSError) as fault:
            found[level] = str(fault)
    return found


def _launch(level: str, settings: Mapping[str, Any]) -> SandboxServer:
    """Start a server and check that it can run code in a session."""
    source = Level(level) if level == "none" else provider(level)
    reason = source.available()
    if reason is not None:
        raise SandboxError(reason)
    server = source.start(**settings)
    try:
        session = server.session()
        execution = session.run("40 + 2")
        session.close()
        if execution.output != "42\n":
            raise SandboxError(f"the first execution failed: {execution.error}")
    except BaseException:
        server.close()
        raise
    return server
