"""The program of a worker process: `python -m agentrl.rollout.worker SOCKET [MEGABYTES]`.

It receives batches of requests and answers them in order, one at a time, so that its pool (`workers`)
knows which request it is working on. A process that an environment forks has the connection closed, and ends
when it returns from the environment.
"""

import faulthandler
import os
import pickle
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

import cloudpickle

from agentrl.data.trajectory import StopReason
from agentrl.env.containment import MAX_ANSWER_BYTES, close_contained, describe_error, too_large
from agentrl.errors import AgentRLError
from agentrl.rollout.environments import Make, TextGym, answer_of, made_or_stop, transition_or_stop
from agentrl.rollout.play import EnvironmentCall, Reset, Restore, Step, Stop

# (slot, kind, payload); kind: construct | reset | step | restore | discard | ask | time
Request = tuple[int, str, Any]
# (slot, kind, payload); kind: transition | stop | void | refused | value | raised | outgrown (of the process)
Answer = tuple[int, str, Any]

_LENGTH = struct.Struct(">Q")
_LARGEST_SNAPSHOT = 1 << 16  # bytes; sending more with every step costs more than replaying the actions


def pack(message: object) -> bytes:
    """Return a pickled message with its length before it."""
    content = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(content)) + content


def unpack(buffer: bytearray) -> Iterator[bytes]:
    """Remove the complete messages from the front of a buffer and yield them, still pickled."""
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        message = bytes(memoryview(buffer)[_LENGTH.size : end])
        del buffer[:end]
        yield message


@dataclass(frozen=True)
class CallTimes:
    """Average time of a reset or step, and what the environment declares about itself.

    Args:
        calls: The number of calls that were timed.
        wall: The mean wall time of a call, in seconds.
        cpu: The mean CPU time of a call in its process, in seconds.
        thread_safe: The environment's `thread_safe` attribute.
        heavy: The environment's `heavy` attribute.
    """

    calls: int
    wall: float
    cpu: float
    thread_safe: bool = False
    heavy: bool = False


def time_calls(env: TextGym, tasks: Sequence[str], seed: int, budget: float = 2.0) -> CallTimes:
    """Time the calls of a few episodes: the first task to warm up, then the others, `budget` seconds each."""
    draw = random.Random(seed)
    calls, wall, cpu = _play_for(env, tasks[:1], seed, draw, budget)
    if len(tasks) > 1:
        calls, wall, cpu = _play_for(env, tasks[1:], seed, draw, budget)
    known = env.unwrapped
    safe, heavy = (bool(getattr(known, name, False)) for name in ("thread_safe", "heavy"))
    return CallTimes(calls, wall / calls, cpu / calls, safe, heavy)


def _play_for(
    env: TextGym, tasks: Sequence[str], seed: int, draw: random.Random, budget: float
) -> tuple[int, float, float]:
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    for task in tasks:
        answer = transition_or_stop(env, Reset(task, seed))
        calls += 1
        for _ in range(20):
            late = time.perf_counter() - wall > budget
            if late or isinstance(answer, Stop) or answer.terminated or answer.truncated:
                break
            answer = transition_or_stop(
                env, Step(draw.choice(answer.info.get("actions") or ("look", "wait")))
            )
            calls += 1
    return calls, time.perf_counter() - wall, time.process_time() - cpu


class Server:
    """Server that answers requests for the environments of this process.

    Args:
        make: The function that makes an environment.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._envs: dict[int, TextGym] = {}

    def answer(self, request: Request) -> Answer:
        """Carry out a request and return its answer; an error is an answer as well."""
        slot, kind, payload = request
        try:
            kind, payload = getattr(self, f"_{kind}")(slot, payload)
        except AgentRLError as error:
            kind, payload = "refused", error
        except BaseException as error:
            stop = Stop(StopReason.ENV_ERROR, describe_error(error))
            kind, payload = ("raised", error) if kind == "ask" else ("stop", astuple(stop))
        return slot, kind, payload

    def close(self) -> None:
        """Close all environments."""
        while self._envs:
            close_contained(self._envs.popitem()[1])

    def _construct(self, slot: int, payload: None) -> tuple[str, Any]:
        made = made_or_stop(self._make)
        if isinstance(made, Stop):
            return "stop", astuple(made)
        self._envs[slot] = made
        return "value", None

    def _reset(self, slot: int, payload: tuple[str, int, bool]) -> tuple[str, Any]:
        return self._effect(slot, Reset(*payload))

    def _step(self, slot: int, payload: tuple[str, bool]) -> tuple[str, Any]:
        return self._effect(slot, Step(*payload))

    def _restore(self, slot: int, payload: tuple[bytes]) -> tuple[str, Any]:
        return self._effect(slot, Restore(pickle.loads(payload[0])))

    def _effect(self, slot: int, effect: EnvironmentCall) -> tuple[str, Any]:
        if slot not in self._envs:
            return "void", None  # its construction failed, which has been reported
        answer = transition_or_stop(self._envs[slot], effect)
        if isinstance(answer, Stop):
            return "stop", astuple(answer)
        return "transition", (
            answer.observation,
            answer.reward,
            answer.terminated,
            answer.truncated,
            dict(answer.info),
            _pickle_snapshot(answer.snapshot),
            answer.briefing,
        )

    def _discard(self, slot: int, payload: None) -> tuple[str, Any]:
        if slot in self._envs:
            close_contained(self._envs.pop(slot))
        return "value", None

    def _ask(self, slot: int, payload: tuple[str, tuple[Any, ...] | None, dict[str, Any]]) -> tuple[str, Any]:
        value = answer_of(self._envs[slot], *payload)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple):
            value = list(value)  # a lazy sequence of task ids cannot be pickled
        return "value", value

    def _time(self, slot: int, payload: tuple[Sequence[str], int]) -> tuple[str, Any]:
        return "value", astuple(time_calls(self._envs[slot], *payload))


def _pickle_snapshot(snapshot: Any) -> bytes | None:
    """Return a snapshot pickled, so that only workers need its classes; None if it cannot be sent."""
    if snapshot is None:
        return None
    try:
        content = pickle.dumps(snapshot, protocol=5)
    except BaseException:
        return None
    return content if len(content) <= _LARGEST_SNAPSHOT else None


def serve(connection: socket.socket, megabytes: float | None = None) -> None:
    """Answer requests until the pool closes the connection or ends.

    Args:
        connection: The connection to the pool.
        megabytes: The memory of this process beyond which it reports its memory in place of an answer, upon
            which the pool kills it; None for no limit.
    """
    buffer = bytearray()
    server: Server | None = None
    process = os.getpid()
    try:
        while data := connection.recv(1 << 20):
            buffer += data
            for message in map(pickle.loads, unpack(buffer)):
                if server is None:
                    server = Server(cloudpickle.loads(message))
                    connection.sendall(pack("hello"))
                    continue
                for request in message:
                    answer = server.answer(request)
                    if os.getpid() != process:  # a copy that the environment forked
                        os._exit(0)
                    memory = _megabytes() if megabytes else 0.0
                    if megabytes and memory > megabytes:
                        answer = (answer[0], "outgrown", memory)
                    connection.sendall(_pack_answer(answer))
    except ConnectionError:
        pass  # the pool has ended
    finally:
        if server is not None:
            server.close()


def _pack_answer(answer: Answer) -> bytes:
    slot, kind, payload = answer
    try:
        content = pack(answer)
        if isinstance(payload, BaseException):  # some errors can be pickled but not unpickled
            pickle.loads(memoryview(content)[_LENGTH.size :])
    except BaseException as error:
        if kind == "refused":
            return pack((slot, kind, AgentRLError(describe_error(payload))))
        if isinstance(payload, BaseException):
            return pack((slot, kind, RuntimeError(describe_error(payload))))
        what = f"its {kind} cannot be sent from its process: {describe_error(error)}"
    else:
        if kind != "transition" or len(content) <= _LARGEST_SNAPSHOT + MAX_ANSWER_BYTES:
            return content
        what = str(too_large(len(content)))
    if kind == "transition":
        return pack((slot, "stop", astuple(Stop(StopReason.CONTRACT, what))))
    return pack((slot, "raised", RuntimeError(what)))


def _megabytes() -> float:
    """Return the resident memory of this process in MB; 0 where /proc has no such file."""
    with suppress(OSError), open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def main(arguments: Sequence[str]) -> None:
    """Serve on the inherited socket until it is closed."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool handles Ctrl-C
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("800")  # out of memory, the kernel kills this process before the trainer
    connection = socket.socket(fileno=int(arguments[0]))
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.close)
    serve(connection, float(arguments[1]) if len(arguments) > 1 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
