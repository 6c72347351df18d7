"""The fork server and its children, as seen from the process that uses them.

Messages of a child are not trusted: they are read up to a maximum size, until a deadline, as JSON. At worst,
a child can lie about its own output.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from agentrl.env.sandbox.isolation import NOBODY
from agentrl.errors import AgentRLError, ConfigError

LEVELS = ("namespaces", "bubblewrap", "seccomp")

_START_SECONDS = 60.0
_END_SECONDS = 30.0
_ANSWER_BYTES = 1 << 16
_ERROR_CHARS = 2_000
_VARIABLES_LOST = "; all variables are lost"

# The server gets these three packages as bare namespaces, since importing them would make it heavy.
_BOOT = """
import sys, types
for name, folder in zip(("agentrl", "agentrl.env", "agentrl.env.sandbox"), sys.argv[1:4]):
    module = types.ModuleType(name)
    module.__path__ = [folder]
    sys.modules[name] = module
from agentrl.env.sandbox.server import main
main(int(sys.argv[4]), int(sys.argv[5]))
"""
# A fixed hash seed makes the order of sets, and thereby the output of code, the same in every run.
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")
}


class SandboxError(AgentRLError):
    """The sandbox itself failed, not the code in it: it cannot start here, or its server died."""


_MAX = {
    "seconds": 86_400,
    "cpu_seconds": 86_400,
    "memory_mb": 2**24,
    "file_mb": 2**20,
    "open_files": 2**20,
    "threads": 4096,
    "output_chars": 10**9,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one execution or of the process of its session.

    Args:
        seconds: The wall-clock time of an execution.
        cpu_seconds: The processor time of an execution, including threads left over from earlier executions,
            which run only during an execution (Linux). A session may use 100 times as much.
        memory_mb: The address space of the session's process in MB, including interpreter and imports.
        file_mb: The size in MB of the output of one execution, and of all files that a session writes.
        open_files: The number of files open at the same time.
        threads: The number of threads at the same time, including the main thread; only "namespaces" allows
            more than one.
        output_chars: The number of characters of output to keep, half from its head and half from its tail.
    """

    seconds: float = 5.0
    cpu_seconds: float = 5.0
    memory_mb: int = 1024
    file_mb: int = 1
    open_files: int = 32
    threads: int = 16
    output_chars: int = 4000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole, most = not name.endswith("seconds"), _MAX[name]
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not right or not 0 < value <= most:
                wanted = "a whole number" if whole else "a number"
                raise ConfigError(f"limits.{name} is {value!r}, not {wanted} above 0 and at most {most}")


@dataclass(frozen=True, slots=True)
class Execution:
    """Result of running a piece of code.

    Args:
        output: The printed text and, as in a notebook, the value of a last line that is an expression.
        error: The error in one line, or None.
        ended: "ok"; "error", after which the variables still exist; "timeout" or "killed", after which the
            next execution starts in a new process.
    """

    output: str
    error: str | None
    ended: Literal["ok", "error", "timeout", "killed"]


class ServerProcess:
    """A running fork server.

    Args:
        isolation: One of `LEVELS`, or "none".
        settings: The settings of the server: limits, imports, path, filter.
        limits: The limits of its sessions.

    Raises:
        SandboxError: The server cannot start; the message gives the reason.
        ConfigError: An import fails.
    """

    def __init__(self, isolation: str, settings: Mapping[str, Any], limits: Limits) -> None:
        self._limits = limits
        self._owner = os.getpid()
        command = _python()
        if isolation != "none" and sys.platform != "linux":
            raise SandboxError(f"needs Linux, and this is {sys.platform}")
        if isolation == "bubblewrap":
            command = _bubblewrap(settings, limits) + command
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
        self._control, control = socket.socketpair(socket.AF_UNIX, kind)
        parent = _this_process()
        inherited = [end for end in (control.fileno(), parent) if end >= 0]
        with tempfile.TemporaryFile() as stderr:
            try:
                self._process = subprocess.Popen(
                    [*command, str(control.fileno()), str(parent)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=_ENVIRONMENT,
                    cwd="/",
                    pass_fds=inherited,
                    start_new_session=True,
                )
            except OSError as fault:
                self._control.close()
                raise SandboxError(f"its server cannot start: {fault}") from fault
            finally:
                control.close()
                if parent >= 0:
                    os.close(parent)
            self._control.settimeout(_START_SECONDS)
            try:
                self._control.send(json.dumps({**settings, "isolation": isolation}).encode())
                answer = self._control.recv(1 << 20)
            except OSError:
                answer = b""
            if not answer:
                self.close()
                stderr.seek(0)
                lines = stderr.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
                raise SandboxError("its server died at the start" + (f": {lines[-1]}" if lines else ""))
        self._control.settimeout(_END_SECONDS)
        message = json.loads(answer)
        if "error" in message:
            self.close()
            if message["stage"] == "import":
                raise ConfigError(f"the sandbox's imports: {message['error']}")
            raise SandboxError(message["error"])
        self.files: dict[str, list[str]] = message["files"]

    @property
    def alive(self) -> bool:
        """Return whether the server is running and belongs to this process."""
        return self._owner == os.getpid() and self._process.poll() is None

    def session(self) -> "ChildProcess":
        """Start an isolated process.

        Raises:
            SandboxError: The process cannot start.
        """
        try:
            child = ChildProcess(self, self._limits)
        except OSError as fault:
            raise SandboxError(str(fault)) from fault
        child.wait_ready()
        return child

    def send_descriptors(self, *descriptors: int) -> None:
        """Ask the server for a child that uses these file descriptors."""
        socket.send_fds(self._control, [b"f"], descriptors)

    def close(self) -> None:
        """Stop the server and its children, if this process started it."""
        self._control.close()
        if self._owner != os.getpid():
            self._process.returncode = 0  # it is not a child of this process, which cannot wait for it
            return
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _this_process() -> int:
    """Return a descriptor that signals the end of this process, or -1 if unsupported.

    Without it, the server ends when the control socket closes.
    """
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return -1


def _python() -> list[str]:
    here = Path(__file__).resolve().parent
    folders = [str(here.parents[1]), str(here.parent), str(here)]
    return [os.path.realpath(sys.executable), "-P", "-s", "-S", "-c", _BOOT, *folders]


def _bubblewrap(settings: Mapping[str, Any], limits: Limits) -> list[str]:
    """Return the command prefix that runs a command with access only to the files that it needs."""
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bwrap is not on PATH")
    unisolated = ServerProcess("none", settings, limits)  # only the imports can tell which files are needed
    unisolated.close()
    files = unisolated.files
    visible = [os.path.realpath(sys.executable), str(Path(__file__).resolve().parent)]
    visible += [*files["library"], *map(str, Path(sys.base_prefix, "lib").glob("libpython*.so*"))]
    command = [program, "--unshare-all", "--unshare-user", "--cap-drop", "ALL"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    for path in visible:
        command += ["--ro-bind", path, path]
    for path in files["masked"]:
        command += ["--tmpfs", path]
    for path in files["packages"]:
        command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/", "--"]


class _ChildLostError(Exception):
    """The child no longer answers, or violates the protocol."""


class _TimeLimitError(Exception):
    """A time limit was exceeded; the message says which."""


class ChildProcess:
    """The process of one session, with a channel for code, a monitor socket and an output file.

    Raises:
        OSError: The server cannot be reached.
    """

    def __init__(self, server: ServerProcess, limits: Limits) -> None:
        self._limits, self._runs, self._pid, self._cpu_before = limits, 0, 0, 0.0
        self._handle = -1  # pidfd of the process, which is safe even if its pid is reused
        self._channel, channel = socket.socketpair()
        self._monitor, monitor = socket.socketpair()
        self._output = _unnamed_file()
        self._poll = select.poll()
        with channel, monitor:
            if hasattr(socket, "SO_PASSCRED"):  # the kernel attaches the sender's pid to messages
                self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                server.send_descriptors(channel.fileno(), self._output.fileno(), monitor.fileno())
            except OSError:
                self._close_descriptors()
                raise
        self._channel.setblocking(False)
        self._poll.register(self._channel, select.POLLIN)

    def wait_ready(self) -> None:
        """Wait until the process is isolated; the kernel attests its pid along with its first message.

        Raises:
            SandboxError: The process cannot start.
        """
        deadline = time.monotonic() + _START_SECONDS
        try:
            self._wait(select.POLLIN, deadline)
            if hasattr(socket, "SO_PASSCRED"):
                head, extra, _, _ = self._channel.recvmsg(4, socket.CMSG_SPACE(12))
                for _, _, credentials in extra:
                    self._pid = struct.unpack_from("i", credentials)[0]
            else:
                head = self._channel.recv(4)
            if len(head) < 4:
                raise _ChildLostError("it sent nothing")
            (size,) = struct.unpack(">I", head)
            error = json.loads(self._receive(size, deadline)).get("error")
        except (_TimeLimitError, _ChildLostError, OSError) as fault:
            error = self._end().get("error", f"{fault}")
        if error:
            self.close()
            raise SandboxError(f"cannot start a process for a session: {error}")
        with suppress(AttributeError, OSError):
            self._handle = os.pidfd_open(self._pid) if self._pid else -1
        self._cpu_before = self._cpu()

    def run(self, code: str) -> Execution:
        """Run code; after "timeout" and "killed", the process has ended and can only be closed.

        Between executions the process is stopped, including threads that code left running (Linux).

        Raises:
            SandboxError: The server died.
        """
        self._runs += 1
        self._signal("SIGCONT")
        error: str | None
        ended: Literal["ok", "error", "timeout", "killed"]
        try:
            error = self._ask(code.encode("utf-8", "replace"))
            self._signal("SIGSTOP")
            ended = "error" if error else "ok"
        except _TimeLimitError as late:
            self._end()
            error, ended = f"{late}{_VARIABLES_LOST}", "timeout"
        except (_ChildLostError, OSError) as fault:
            error, ended = f"{_cause(self._end().get('status', 0), str(fault))}{_VARIABLES_LOST}", "killed"
        self._cpu_before = self._cpu()
        size = self._limits.file_mb << 20
        output = os.pread(self._output.fileno(), size, 0)
        if len(output) == size and error is None:
            error, ended = f"printed more than {self._limits.file_mb} MB", "error"
        if output:
            os.ftruncate(self._output.fileno(), 0)
        return Execution(
            truncate_middle(output.decode("utf-8", "replace"), self._limits.output_chars), error, ended
        )

    def _ask(self, code: bytes) -> str | None:
        """Send code and return the error of the answer, or None."""
        # The processor time of threads since the last execution counts too.
        deadline, cpu = time.monotonic() + self._limits.seconds, self._cpu_before
        self._send(struct.pack(">I", len(code)) + code, deadline, cpu)
        (size,) = struct.unpack(">I", self._receive(4, deadline, cpu))
        if size > _ANSWER_BYTES:
            raise _ChildLostError("it sent an invalid answer")
        answer = self._receive(size, deadline, cpu)
        try:
            message = json.loads(answer)
            number, error = message["number"], message["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _ChildLostError("it sent an invalid answer") from None
        if number != self._runs or not (error is None or isinstance(error, str)):
            raise _ChildLostError("it sent an invalid answer")
        return None if error is None else _one_line(error[:_ERROR_CHARS])

    def _send(self, data: bytes, deadline: float, cpu: float) -> None:
        """Send all data by the deadline."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._channel.send(left) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, cpu)

    def _receive(self, size: int, deadline: float, cpu: float | None = None) -> bytes:
        """Receive exactly `size` bytes by the deadline."""
        data = b""
        while len(data) < size:
            try:
                part = self._channel.recv(size - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, cpu)
                continue
            if not part:
                raise _ChildLostError("it closed its channel")
            data += part
        return data

    def _wait(self, event: int, deadline: float, cpu: float | None = None) -> None:
        """Wait for the channel until the deadline, or until `cpu_seconds` are used beyond `cpu`."""
        limits = self._limits
        self._poll.modify(self._channel, event)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _TimeLimitError(f"took longer than {limits.seconds:g} s")
            if cpu is not None and self._pid:
                spare = cpu + limits.cpu_seconds - self._cpu()
                if spare <= 0:
                    raise _TimeLimitError(f"used more than {limits.cpu_seconds:g} s of processor time")
                # Several threads use processor time faster than wall-clock time passes.
                left = min(left, max(spare / (os.cpu_count() or 1), 0.005))
            if self._poll.poll(left * 1000):
                return

    def _cpu(self) -> float:
        """Return the processor time in seconds that the process has used so far."""
        try:
            # The kernel's clock id for the processor time of a process.
            return time.clock_gettime((~self._pid << 3) | 2) if self._pid else 0.0
        except OSError:
            return 0.0

    def _end(self) -> dict[str, Any]:
        """Kill the process, wait for its end, and return the status reported by the server."""
        try:
            self._monitor.settimeout(_END_SECONDS)
            with suppress(BrokenPipeError):
                self._monitor.send(b"k")
            answer = self._monitor.recv(4096)
        except OSError:
            answer = b""
        self._close_descriptors()
        if not answer:
            raise SandboxError("the sandbox's server died, or was closed, with a session open")
        return dict(json.loads(answer))

    def _signal(self, name: str) -> None:
        if self._handle >= 0:
            with suppress(OSError):  # it has ended, or this user may not signal it
                signal.pidfd_send_signal(self._handle, getattr(signal, name))

    def _close_descriptors(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._monitor.close()
        self._channel.close()

    def close(self) -> None:
        """End the process and everything that it started."""
        if self._monitor.fileno() >= 0:
            with suppress(SandboxError):  # if the server is gone, so is the process
                self._end()
        self._output.close()


def _unnamed_file() -> IO[bytes]:
    """Return an append-only file without a name."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = open(os.memfd_create("output"), "r+b", buffering=0)  # noqa: SIM115
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
    return file


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().splitlines())


def _cause(status: int, fault: str) -> str:
    """Return why a process ended, from its wait status."""
    if os.WIFEXITED(status):
        return f"the process ended itself (exit status {os.WEXITSTATUS(status)})"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL:
        return f"the process was killed ({fault})"
    return f"the process crashed ({signal.Signals(number).name})"


def truncate_middle(text: str, limit: int) -> str:
    """Return a text truncated to `limit` characters, half from its head and half from its tail."""
    if len(text) <= limit:
        return text
    head, tail = (limit + 1) // 2, limit // 2
    return f"{text[:head]}\n[… {len(text) - limit} characters cut …]\n{text[len(text) - tail :]}"
