"""Function calls with hard limits on CPU time and memory, each in a separate process.

They judge a policy's text with code that cannot be interrupted in any other way.
"""

import atexit
import base64
import importlib
import json
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import suppress
from typing import Any, TextIO, cast

from agentrl.errors import AgentRLError

CPU_SECONDS = 5.0  # of one call
WALL_SECONDS = 120.0  # after which a process that has not used up its CPU seconds counts as broken
PROCESSES = 2
MEMORY_BYTES = 2 << 30

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from agentrl_envs.limited_calls import serve
serve()
"""
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL}


class OverLimitError(Exception):
    """The call exceeded its CPU time or memory, or crashed its process twice."""


class JudgeError(AgentRLError):
    """The process that judges answers failed, so the answer is neither correct nor wrong."""


class LimitedCalls:
    """Pool of at most `PROCESSES` processes, started on demand; thread-safe.

    The processes end when the last user leaves or this process exits. If this process is killed during a
    call, that call's process ends at most `CPU_SECONDS` later.
    """

    def __init__(self) -> None:
        self._turns = threading.BoundedSemaphore(PROCESSES)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def join(self, user: object) -> None:
        """Register a user: the processes are kept until it leaves."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """Unregister a user, and end the processes if it was the last one."""
        if user in self._users:
            self._users.discard(user)
            if not self._users:
                self.close()

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        """Call `module.function` in a process and return its result, a JSON value.

        Raises:
            OverLimitError: The call exceeded the limits, which is the fault of its arguments.
            JudgeError: A process cannot be started, or died for a reason other than its call.
        """
        question = base64.b64encode(pickle.dumps((module, function, arguments))).decode()
        lost = 0
        with self._turns:
            for _ in range(2):  # a process can die for a reason other than its call
                process = self._take()
                answer = process.ask(question)
                if isinstance(answer, dict):
                    self._idle.put(process)
                    if "broken" in answer:
                        raise JudgeError(f"{module}.{function}: {answer['broken']}")
                    return answer["result"]
                lost = answer
                if lost == -signal.SIGPROF:
                    raise OverLimitError
        if lost > 0 or lost in _CRASHES:
            raise OverLimitError
        raise JudgeError(f"{module}.{function}: its process died twice, with exit code {lost}")

    def _take(self) -> "_Process":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Process()

    def close(self) -> None:
        """End the idle processes; a later call starts new ones."""
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


class _Process:
    """A process that runs one call at a time.

    It is a fresh interpreter and not a `multiprocessing` child, which would run the main script again.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            text=True,
            start_new_session=True,  # Ctrl-C must not reach it
        )
        self._to, self._from = cast(TextIO, self._process.stdin), cast(TextIO, self._process.stdout)
        if self._read() != "ready":
            self._errors.seek(0)
            reason = self._errors.read()[-500:].strip() or "no error output"
            self.close()
            raise JudgeError(f"a process to judge answers cannot be started: {reason}")

    def ask(self, question: str) -> dict[str, Any] | int:
        """Run a call; return its outcome, or the exit code if the process died."""
        try:
            self._to.write(question + "\n")
            self._to.flush()
        except OSError:
            return self.close()
        answer = self._read()
        return cast(dict[str, Any], json.loads(answer)) if answer.endswith("}") else self.close()

    def _read(self) -> str:
        ready, _, _ = select.select([self._from], [], [], WALL_SECONDS)
        return self._from.readline().strip() if ready else ""

    def close(self) -> int:
        """End the process, if it has not ended, and return its exit code."""
        self._process.kill()
        code = self._process.wait()
        for stream in (self._from, self._to, self._errors):
            with suppress(OSError):  # flushing unsent input fails
                stream.close()
        return code


calls = LimitedCalls()
atexit.register(lambda: calls.close())


def _reset_after_fork() -> None:
    global calls
    calls = LimitedCalls()


os.register_at_fork(after_in_child=_reset_after_fork)  # a child must not talk to its parent's processes


def serve() -> None:
    """Serve calls from standard input until it ends; the main loop of a process."""
    import resource

    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    _write_line(answers, "ready")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        try:
            module, function, arguments = pickle.loads(base64.b64decode(line))
            called = getattr(importlib.import_module(module), function)
        except Exception as error:
            _write_line(answers, json.dumps({"broken": f"{type(error).__name__}: {error}"}))
            continue
        # The signal has no handler, so it ends the process wherever it is.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            result = called(*arguments)
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write_line(answers, json.dumps({"result": result}))


def _write_line(answers: TextIO, text: str) -> None:
    answers.write(text + "\n")
    answers.flush()
