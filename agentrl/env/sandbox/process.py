"""The fork server and one of its children, as seen from the process that uses them.

Nothing that a child sends is trusted: it is read with a cap, until a deadline, as JSON; the worst it can do
is to lie about its own output.
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

# The server sees these three packages as bare folders: importing them for real would make it heavy.
_BOOT = """
import sys, types
for name, folder in zip(("agentrl", "agentrl.env", "agentrl.env.sandbox"), sys.argv[1:4]):
    module = types.ModuleType(name)
    module.__path__ = [folder]
    sys.modules[name] = module
from agentrl.env.sandbox.server import main
main(int(sys.argv[4]), int(sys.argv[5]))
"""
# A fixed hash seed makes the order of sets, and so what code prints, the same in every run.
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")
}


class SandboxError(AgentRLError):
    """The sandbox itself failed: it cannot start here, or its server died. Never something that code did."""


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
    """What one execution, or the process of its session, may use.

    Args:
        seconds: of an execution, by the clock on the wall.
        cpu_seconds: of an execution, with the threads that earlier ones left: they run on in it, and stand
            still between (Linux); a session ends at 100 times as much.
        memory_mb: address space of the session's process, interpreter and imports included.
        file_mb: of what one execution prints, and of all files that a session writes.
        open_files: at once.
        threads: at once, the main one included; only "namespaces" allows more than one.
        output_chars: of the output that is kept, half from its head and half from its tail.
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
    """What came of running a piece of code.

    Args:
        output: what was printed and, as in a notebook, the value of a last line that is an expression.
        error: what went wrong, in one line; None when nothing did.
        ended: "ok"; "error", after which the variables are still there; "timeout" or "killed", after which
            the next execution starts in a fresh process.
    """

    output: str
    error: str | None
    ended: Literal["ok", "error", "timeout", "killed"]


class ServerProcess:
    """A running fork server.

    Args:
        isolation: one of `LEVELS`, or "none".
        settings: for the server: limits, imports, path, filter.
        limits: of its sessions.

    Raises:
        SandboxError: it cannot start; the message says why.
        ConfigError: one of the imports cannot be imported.
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
        handed = [end for end in (control.fileno(), parent) if end >= 0]
        with tempfile.TemporaryFile() as complaints:
            try:
                self._process = subprocess.Popen(
                    [*command, str(control.fileno()), str(parent)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    env=_ENVIRONMENT,
                    cwd="/",
                    pass_fds=handed,
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
                complaints.seek(0)
                lines = complaints.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
                raise SandboxError("its server died at the start" + (f": {lines[-1]}" if lines else ""))
        self._control.settimeout(_END_SECONDS)
        said = json.loads(answer)
        if "error" in said:
            self.close()
            if said["stage"] == "import":
                raise ConfigError(f"the sandbox's imports: {said['error']}")
            raise SandboxError(said["error"])
        self.files: dict[str, list[str]] = said["files"]

    @property
    def alive(self) -> bool:
        return self._owner == os.getpid() and self._process.poll() is None

    def session(self) -> "ChildProcess":
        """A process that is shut in.

        Raises:
            SandboxError: there is none to be had.
        """
        try:
            child = ChildProcess(self, self._limits)
        except OSError as fault:
            raise SandboxError(str(fault)) from fault
        child.wait_ready()
        return child

    def send_descriptors(self, *descriptors: int) -> None:
        socket.send_fds(self._control, [b"f"], descriptors)

    def close(self) -> None:
        """End the server and its children, if this is the process that started it."""
        self._control.close()
        if self._owner != os.getpid():
            self._process.returncode = 0  # not ours to wait for
            return
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _this_process() -> int:
    """A descriptor that tells when this process ends, or -1; without one the control socket has to do."""
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return -1


def _python() -> list[str]:
    here = Path(__file__).resolve().parent
    folders = [str(here.parents[1]), str(here.parent), str(here)]
    return [os.path.realpath(sys.executable), "-P", "-s", "-S", "-c", _BOOT, *folders]


def _bubblewrap(settings: Mapping[str, Any], limits: Limits) -> list[str]:
    """The start of a command that runs the rest of it with nothing but the files that it needs."""
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bwrap is not on PATH")
    trial = ServerProcess("none", settings, limits)  # which files there are to be seen, only imports can tell
    trial.close()
    files = trial.files
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
    """The child does not answer any more, or not in the way agreed upon."""


class _TimeLimitError(Exception):
    """A limit of time has passed; the message says which."""


class ChildProcess:
    """A process for one session: a channel to it, a monitor on it, and the file that it prints to.

    Raises:
        SandboxError: there is none to be had.
        OSError: the server cannot be reached.
    """

    def __init__(self, server: ServerProcess, limits: Limits) -> None:
        self._limits, self._runs, self._pid, self._cpu_before = limits, 0, 0, 0.0
        self._handle = -1  # a descriptor of the process, by which no other can be meant
        self._channel, channel = socket.socketpair()
        self._monitor, monitor = socket.socketpair()
        self._output = _unnamed_file()
        self._poll = select.poll()
        with channel, monitor:
            if hasattr(socket, "SO_PASSCRED"):
                self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                server.send_descriptors(channel.fileno(), self._output.fileno(), monitor.fileno())
            except OSError:
                self._close_descriptors()
                raise
        self._channel.setblocking(False)
        self._poll.register(self._channel, select.POLLIN)

    def wait_ready(self) -> None:
        """Wait until the process is shut in; the kernel says along with its greeting which one it is."""
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
                raise _ChildLostError("it said nothing")
            (size,) = struct.unpack(">I", head)
            error = json.loads(self._receive(size, deadline)).get("error")
        except (_TimeLimitError, _ChildLostError, OSError) as fault:
            error = self._end().get("error", f"{fault}")
        if error:
            self.close()
            raise SandboxError(f"no process for a session: {error}")
        with suppress(AttributeError, OSError):
            self._handle = os.pidfd_open(self._pid) if self._pid else -1
        self._cpu_before = self._cpu()

    def run(self, code: str) -> Execution:
        """Run code; after "timeout" and "killed" the process is gone and can only be closed.

        Between two executions it stands still, with the threads that code left running (Linux).

        Raises:
            SandboxError: the server died.
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
        # What threads used since the last execution counts as well.
        deadline, cpu = time.monotonic() + self._limits.seconds, self._cpu_before
        self._send(struct.pack(">I", len(code)) + code, deadline, cpu)
        (size,) = struct.unpack(">I", self._receive(4, deadline, cpu))
        if size > _ANSWER_BYTES:
            raise _ChildLostError("it answered nonsense")
        answer = self._receive(size, deadline, cpu)
        try:
            said = json.loads(answer)
            number, error = said["number"], said["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _ChildLostError("it answered nonsense") from None
        if number != self._runs or not (error is None or isinstance(error, str)):
            raise _ChildLostError("it answered nonsense")
        return None if error is None else _one_line(error[:_ERROR_CHARS])

    def _send(self, data: bytes, deadline: float, cpu: float) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._channel.send(left) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, cpu)

    def _receive(self, size: int, deadline: float, cpu: float | None = None) -> bytes:
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
        """Wait for the channel until the deadline, or until `cpu_seconds` more than `cpu` are used."""
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
                # Several threads use it up faster than the clock runs.
                left = min(left, max(spare / (os.cpu_count() or 1), 0.005))
            if self._poll.poll(left * 1000):
                return

    def _cpu(self) -> float:
        """Seconds of processor time that the process has used so far."""
        try:
            return time.clock_gettime((~self._pid << 3) | 2) if self._pid else 0.0
        except OSError:
            return 0.0

    def _end(self) -> dict[str, Any]:
        """Kill the process and wait until it is gone; what the server says of its end."""
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
            with suppress(OSError):  # it has ended, or may not be stopped by this user
                signal.pidfd_send_signal(self._handle, getattr(signal, name))

    def _close_descriptors(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._monitor.close()
        self._channel.close()

    def close(self) -> None:
        """End the process, and with it everything that it started."""
        if self._monitor.fileno() >= 0:
            with suppress(SandboxError):  # without a server there is no process either
                self._end()
        self._output.close()


def _unnamed_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = open(os.memfd_create("output"), "r+b", buffering=0)  # noqa: SIM115
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
    return file


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().splitlines())


def _cause(status: int, fault: str) -> str:
    if os.WIFEXITED(status):
        return f"the process ended itself (exit status {os.WEXITSTATUS(status)})"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL:
        return f"the process was killed ({fault})"
    return f"the process crashed ({signal.Signals(number).name})"


def truncate_middle(text: str, limit: int) -> str:
    """Keep so many characters of a text, half from its head and half from its tail."""
    if len(text) <= limit:
        return text
    head, tail = (limit + 1) // 2, limit // 2
    return f"{text[:head]}\n[… {len(text) - limit} characters cut …]\n{text[len(text) - tail :]}"
