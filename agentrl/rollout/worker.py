"""The process that environments live in: `python -m agentrl.rollout.worker SOCKET`.

It is sent batches of requests and answers them in order, each before it turns to the next, so that the
supervisor knows what it is at. `workers` is the other side.
"""

import faulthandler
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
from agentrl.errors import AgentRLError
from agentrl.rollout.environments import Make, TextGym, made_or_stop, transition_or_stop
from agentrl.rollout.play import EnvironmentCall, Reset, Restore, Step, Stop
from agentrl.values import described

# (place, kind, payload): construct | reset | step | restore | discard | ask | time
Request = tuple[int, str, Any]
# (place, kind, payload): transition | stop | void | refused | value | callable | raised
Answer = tuple[int, str, Any]

_LENGTH = struct.Struct(">Q")
_LARGEST_SNAPSHOT = 1 << 16  # bytes; to play the actions again costs less than to send more with every step


def pack(message: object) -> bytes:
    """A message with its length before it."""
    content = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(content)) + content


def unpack(buffer: bytearray) -> Iterator[Any]:
    """Take the whole messages off the front of what was received."""
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        message = pickle.loads(memoryview(buffer)[_LENGTH.size : end])
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
        place, kind, payload = request
        try:
            kind, payload = getattr(self, f"_{kind}")(place, payload)
        except AgentRLError as error:
            kind, payload = "refused", error
        except BaseException as error:  # SystemExit as well: it is the environment's, not ours
            stop = Stop(StopReason.ENV_ERROR, described(error))
            kind, payload = ("raised", error) if kind == "ask" else ("stop", astuple(stop))
        return place, kind, payload

    def close(self) -> None:
        while self._envs:
            with suppress(Exception):
                self._envs.popitem()[1].close()

    def _construct(self, place: int, payload: None) -> tuple[str, Any]:
        made = made_or_stop(self._make)
        if isinstance(made, Stop):
            return "stop", astuple(made)
        self._envs[place] = made
        return "value", None

    def _reset(self, place: int, payload: tuple[str, int, bool]) -> tuple[str, Any]:
        return self._effect(place, Reset(*payload))

    def _step(self, place: int, payload: tuple[str, bool]) -> tuple[str, Any]:
        return self._effect(place, Step(*payload))

    def _restore(self, place: int, payload: tuple[bytes]) -> tuple[str, Any]:
        return self._effect(place, Restore(pickle.loads(payload[0])))

    def _effect(self, place: int, effect: EnvironmentCall) -> tuple[str, Any]:
        if place not in self._envs:
            return "void", None  # it could not be constructed, which has been said already
        answer = transition_or_stop(self._envs[place], effect)
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

    def _discard(self, place: int, payload: None) -> tuple[str, Any]:
        with suppress(Exception):
            self._envs.pop(place).close()
        return "value", None

    def _ask(
        self, place: int, payload: tuple[str, tuple[Any, ...] | None, dict[str, Any]]
    ) -> tuple[str, Any]:
        name, args, kwargs = payload
        env = self._envs[place]
        value = getattr(env if name in ("reset", "step") else env.unwrapped, name)
        if args is not None:
            value = value(*args, **kwargs)
        elif callable(value):
            return "callable", None
        if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple):
            value = list(value)  # task ids may be made when asked for, which does not travel
        return "value", value

    def _time(self, place: int, payload: tuple[Sequence[str], int]) -> tuple[str, Any]:
        return "value", astuple(time_calls(self._envs[place], *payload))


def _portable(snapshot: Any) -> bytes | None:
    """A snapshot as it travels, None for what cannot: only a worker need know what it is."""
    if snapshot is None:
        return None
    try:
        content = pickle.dumps(snapshot, protocol=5)
    except Exception:
        return None
    return content if len(content) <= _LARGEST_SNAPSHOT else None


def serve(connection: socket.socket) -> None:
    """Answer until the supervisor says that there is no more, or is gone."""
    buffer = bytearray()
    server: Server | None = None
    try:
        while data := connection.recv(1 << 20):
            buffer += data
            for message in unpack(buffer):
                if server is None:
                    server = Server(cloudpickle.loads(message))
                    connection.sendall(pack("hello"))
                else:
                    for request in message:
                        connection.sendall(_packed(server.answer(request)))
    except ConnectionError:
        pass  # nobody is left to answer
    finally:
        if server is not None:
            server.close()


def _packed(answer: Answer) -> bytes:
    try:
        return pack(answer)
    except Exception:
        return pack(_sendable(answer))


def _sendable(answer: Answer) -> Answer:
    """What cannot leave the process is the environment's fault."""
    place, kind, payload = answer
    try:
        pickle.dumps(payload)
    except Exception as error:
        what = f"its {kind} cannot leave its process: {described(error)}"
        if kind == "transition":
            return place, "stop", astuple(Stop(StopReason.CONTRACT, what))
        return place, "raised", RuntimeError(what)
    return answer


def main(arguments: Sequence[str]) -> None:
    """Serve on the inherited socket until it is closed."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("800")  # rather this process than the one that learns
    serve(socket.socket(fileno=int(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
