"""Calls with a hard limit: for judging what a policy wrote by code that nothing else can interrupt."""

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
WALL_SECONDS = 120.0  # after which a process that did not even use its CPU seconds counts as broken
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
    """The call took more than its CPU seconds or memory, or crashed its process each time."""


class JudgeError(AgentRLError):
    """The process that was to judge an answer failed: nothing is known about the answer."""


class LimitedCalls:
    """At most `PROCESSES` processes, each started when it is needed first; called from any thread.

    They end with the last user that has joined, with this process, and, if they are in the middle of a call
    when this process is killed, `CPU_SECONDS` later.
    """

    def __init__(self) -> None:
        self._turns = threading.BoundedSemaphore(PROCESSES)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def join(self, user: object) -> None:
        """Keep the processes until `user` leaves."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """End the processes if nobody else has joined."""
        if user in self._users:
            self._users.discard(user)
            if not self._users:
                self.close()

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        """Call `module.function`, imported there, and return its result, a JSON value.

        Raises:
            OverLimitError: the call was too much; whoever wrote the arguments is to blame.
            JudgeError: a process cannot be started, or was lost to something else than its call.
        """
        question = base64.b64encode(pickle.dumps((module, function, arguments))).decode()
        lost = 0
        with self._turns:
            for _ in range(2):  # a process can be lost to something else than its call
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
        raise JudgeError(f"{module}.{function}: its process was lost twice, with exit code {lost}")

    def _take(self) -> "_Process":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Process()

    def close(self) -> None:
        """End the processes that have nothing to do; a later call starts new ones."""
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


class _Process:
    """One call at a time. It is a plain interpreter, so that nobody's script is run twice."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            text=True,
            start_new_session=True,  # Ctrl-C is for who calls
        )
        self._to, self._from = cast(TextIO, self._process.stdin), cast(TextIO, self._process.stdout)
        if self._read() != "ready":
            self._errors.seek(0)
            reason = self._errors.read()[-500:].strip() or "it says nothing"
            self.close()
            raise JudgeError(f"a process to judge answers does not start: {reason}")

    def ask(self, question: str) -> dict[str, Any] | int:
        """What came of a call, or the exit code of the process that was lost over it."""
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
            with suppress(OSError):  # of what it was never told
                stream.close()
        return code


calls = LimitedCalls()
atexit.register(lambda: calls.close())


def _forget() -> None:
    global calls
    calls = LimitedCalls()


os.register_at_fork(after_in_child=_forget)  # the parent's processes are not the child's to talk to


def serve() -> None:
    """Answer calls from the standard input until it ends; this is the process's whole life."""
    import resource

    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    _say(answers, "ready")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        try:
            module, function, arguments = pickle.loads(base64.b64decode(line))
            called = getattr(importlib.import_module(module), function)
        except Exception as error:
            _say(answers, json.dumps({"broken": f"{type(error).__name__}: {error}"}))
            continue
        # Nobody handles this signal: it ends the process wherever it computes.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            result = called(*arguments)
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(answers, json.dumps({"result": result}))


def _say(answers: TextIO, text: str) -> None:
    answers.write(text + "\n")
    answers.flush()
