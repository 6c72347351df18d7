"""The process that environments live in: `python -m agentrl.rollout.worker SOCKET [MEGABYTES]`.

It is sent batches of requests and answers them in order, each before it turns to the next, so that the
supervisor knows what it is at. `workers` is the other side. Nobody else speaks on its connection: a process
that an environment forks has it closed, and ends where it comes back from the environment.
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

# (slot, kind, payload): construct | reset | step | restore | discard | ask | time
Request = tuple[int, str, Any]
# (slot, kind, payload): transition | stop | void | refused | value | raised, or outgrown of the process
Answer = tuple[int, str, Any]

_LENGTH = struct.Struct(">Q")
_LARGEST_SNAPSHOT = 1 << 16  # bytes; to play the actions again costs less than to send more with every step


def pack(message: object) -> bytes:
    """A message with its length before it."""
    content = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(content)) + content


def unpack(buffer: bytearray) -> Iterator[bytes]:
    """Take the whole messages off the front of what was received, still pickled."""
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        message = bytes(memoryview(buffer)[_LENGTH.size : end])
        del buffer[:end]
        yield message


@dataclass(frozen=True)
class CallTimes:
    """Seconds that a reset or step takes on average, and what the environment declares about itself."""

    calls: int
    wall: float
    cpu: float
    thread_safe: bool = False
    heavy: bool = False


def time_calls(env: TextGym, tasks: Sequence[str], seed: int, patience: float = 2.0) -> CallTimes:
    """Play the first of `tasks` to warm up, then the others, for about `patience` seconds each."""
    draw = random.Random(seed)
    calls, wall, cpu = _play_for(env, tasks[:1], seed, draw, patience)
    if len(tasks) > 1:
        calls, wall, cpu = _play_for(env, tasks[1:], seed, draw, patience)
    known = env.unwrapped
    safe, heavy = (bool(getattr(known, name, False)) for name in ("thread_safe", "heavy"))
    return CallTimes(calls, wall / calls, cpu / calls, safe, heavy)


def _play_for(
    env: TextGym, tasks: Sequence[str], seed: int, draw: random.Random, patience: float
) -> tuple[int, float, float]:
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    for task in tasks:
        answer = transition_or_stop(env, Reset(task, seed))
        calls += 1
        for _ in range(20):
            late = time.perf_counter() - wall > patience
            if late or isinstance(answer, Stop) or answer.terminated or answer.truncated:
                break
            answer = transition_or_stop(
                env, Step(draw.choice(answer.info.get("actions") or ("look", "wait")))
            )
            calls += 1
    return calls, time.perf_counter() - wall, time.process_time() - cpu


class Server:
    """Answers requests about the environments of this process.

    Args:
        make: makes one.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._envs: dict[int, TextGym] = {}

    def answer(self, request: Request) -> Answer:
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
            return "void", None  # it could not be constructed, which has been said already
        answer = transition_or_stop(self._envs[slot], effect)
        if isinstance(answer, Stop):
            return "stop", astuple(answer)
        return "transition", (
            answer.observation,
            answer.reward,
            answer.terminated,
            answer.truncated,
            dict(answer.info),
            _portable(answer.snapshot),
        )

    def _discard(self, slot: int, payload: None) -> tuple[str, Any]:
        if slot in self._envs:
            close_contained(self._envs.pop(slot))
        return "value", None

    def _ask(self, slot: int, payload: tuple[str, tuple[Any, ...] | None, dict[str, Any]]) -> tuple[str, Any]:
        value = answer_of(self._envs[slot], *payload)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple):
            value = list(value)  # task ids may be made when asked for, which does not travel
        return "value", value

    def _time(self, slot: int, payload: tuple[Sequence[str], int]) -> tuple[str, Any]:
        return "value", astuple(time_calls(self._envs[slot], *payload))


def _portable(snapshot: Any) -> bytes | None:
    """A snapshot as it travels, None for what cannot: only a worker need know what it is."""
    if snapshot is None:
        return None
    try:
        content = pickle.dumps(snapshot, protocol=5)
    except BaseException:
        return None
    return content if len(content) <= _LARGEST_SNAPSHOT else None


def serve(connection: socket.socket, megabytes: float | None = None) -> None:
    """Answer until the supervisor says that there is no more, or is gone.

    Args:
        connection: to the supervisor.
        megabytes: that this process may hold; it is told of more, in the slot of an answer, and ends it.
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
                    if os.getpid() != process:
                        os._exit(0)
                    held = _megabytes() if megabytes else 0.0
                    if megabytes and held > megabytes:
                        answer = (answer[0], "outgrown", held)
                    connection.sendall(_packed(answer))
    except ConnectionError:
        pass  # nobody is left to answer
    finally:
        if server is not None:
            server.close()


def _packed(answer: Answer) -> bytes:
    slot, kind, payload = answer
    try:
        content = pack(answer)
        if isinstance(payload, BaseException):  # some can be written and not read
            pickle.loads(memoryview(content)[_LENGTH.size :])
    except BaseException as error:
        if kind == "refused":
            return pack((slot, kind, AgentRLError(describe_error(payload))))
        if isinstance(payload, BaseException):
            return pack((slot, kind, RuntimeError(describe_error(payload))))
        what = f"its {kind} cannot leave its process: {describe_error(error)}"
    else:
        if kind != "transition" or len(content) <= _LARGEST_SNAPSHOT + MAX_ANSWER_BYTES:
            return content
        what = str(too_large(len(content)))
    if kind == "transition":
        return pack((slot, "stop", astuple(Stop(StopReason.CONTRACT, what))))
    return pack((slot, "raised", RuntimeError(what)))


def _megabytes() -> float:
    """Resident memory of this process, where the kernel tells."""
    with suppress(OSError), open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def main(arguments: Sequence[str]) -> None:
    """Serve on the inherited socket until it is closed."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("800")  # rather this process than the one that learns
    connection = socket.socket(fileno=int(arguments[0]))
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.close)
    serve(connection, float(arguments[1]) if len(arguments) > 1 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
