"""Engines on a Ray cluster: actors that each hold a copy of the weights and receive requests in batches.

A sequence stays on the actor that holds its keys and values. When an actor is lost, so are its sequences:
their requests are answered with `lost=True`, which no episode is blamed for, and a new actor replaces it.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from transformers import PreTrainedModel

from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter, Generation, GenerationRequest
from agentrl.policy.settings import EngineConfig
from agentrl.scale.cluster import (
    check_capacity,
    check_cluster,
    connected,
    is_lost,
    short_reason,
    wait_for_head,
)
from agentrl.scale.engine_host import EngineHost, EngineSpec, export_weights, strip_weights
from agentrl.scale.messages import pack_requests, unpack_generations

_REPLY_TARGET = 16  # finished replies for which an actor returns a message at once
_MAX_WAIT = 0.05  # seconds that a finished reply waits for others, and `step` for a message
_START_TIMEOUT = 600.0  # seconds for an actor to load its model
_CLOSE_TIMEOUT = 30.0  # seconds for an actor to close its engine
_RESPONSE_TIMEOUT = 600.0  # seconds without an answer after which an actor counts as lost


class RayEngines:
    """`Engine` that spreads sequences over several actors.

    Args:
        model: The model whose weights they generate with; `refresh` puts them into the object store once for
            all actors.
        config: The engine of each actor, and the number of actors.
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        max_context: The largest number of tokens in a sequence.
        max_sequences: The largest number of sequences on all actors together.
        address: The address of the cluster; see `RayConfig`.
        adapters: The largest adapters that `refresh` gets, if the actors take any as such.

    Attributes:
        messages: The number of messages with requests sent to actors.
        restarts: The number of actors that were lost and replaced.

    Raises:
        ConfigError: If there is no cluster, it is too small, or an actor cannot start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        *,
        stop_ids: Iterable[int],
        max_context: int,
        max_sequences: int,
        address: str | None = None,
        adapters: LoraConfig | None = None,
    ) -> None:
        count = config.actors or 1
        self.provides, self.messages, self.restarts = config.provides, 0, 0
        self._model, self._config, self._version = model, config, 0
        self._hosts: list[_Host] = []
        self._host_of: dict[str, _Host | None] = {}  # by sequence; None where its actor is lost
        self._in_flight: dict[str, int] = {}  # by sequence: the number of its request
        self._ready: deque[Generation] = deque()
        self._numbers = 0
        self._connection = ExitStack()
        self._connection.enter_context(connected(address))
        try:
            check_capacity("engine.actors", count, cpus=config.actor_cpus, gpus=config.actor_gpus)
            share = -(-max_sequences // count)  # rounded up
            spec = EngineSpec(
                strip_weights(model), config, tuple(stop_ids), max_context, share, sys.path, adapters
            )
            self._spec, self._weights = ray.put(spec), ray.put(export_weights(model))
            self._adapter: Any = None  # a reference to the one that the actors were sent last
            for _ in range(count):
                self._start()
            self.max_context = min(self._wait_until_started())
        except BaseException:
            self.close()
            raise

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request for the actor that holds its sequence, or its parent's, or for the least loaded."""
        sequence = request.sequence
        if sequence in self._in_flight:
            error = f"sequence {sequence!r} has a request in flight; wait for its generation"
            self._ready.append(Generation(sequence, policy_version=self._version, error=error))
            return
        host = self._host_of.get(sequence)
        # The tokens of a sequence are lost with its actor; only a new one can start elsewhere.
        if host is None and sequence in self._host_of and not request.new_sequence:
            self._report_lost(sequence, "its actor was lost between two requests")
            return
        if host is None:
            host = self._host_of[sequence] = self._host_of.get(request.parent or "") or self._least_loaded()
            host.sequences.add(sequence)
        self._numbers += 1
        self._in_flight[sequence] = self._numbers
        host.outbox[sequence] = self._numbers, request

    def step(self) -> Sequence[Generation]:
        """Send queued requests to idle actors, and return the generations that came back.

        Waits for `_MAX_WAIT` seconds at most when there are none.
        """
        check_cluster()
        for host in self._hosts:
            if host.call is None and any(sequence in self._in_flight for sequence in host.sequences):
                released, host.released = host.released, []
                requests, host.outbox = list(host.outbox.values()), {}
                host.start_call("exchange", released, pack_requests(requests), _REPLY_TARGET, _MAX_WAIT)
                self.messages += 1
        calls = {host.call: host for host in self._hosts if host.call is not None}
        if calls:
            ray.wait(list(calls), timeout=0.0 if self._ready else _MAX_WAIT)
            # The wait above ends with the first answer; collect all that have come by now.
            for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
                self._receive(calls[call])
        for host in [host for host in self._hosts if host.is_overdue()]:
            self._drop_host(host, f"no answer in {_RESPONSE_TIMEOUT:g} s")
        found = list(self._ready)
        self._ready.clear()
        return found

    def release(self, sequence: str) -> None:
        """Forget a sequence and its request in flight; unknown names are fine."""
        self._in_flight.pop(sequence, None)
        host = self._host_of.pop(sequence, None)
        if host is not None:
            host.sequences.remove(sequence)
            host.outbox.pop(sequence, None)
            host.released.append(sequence)

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        """Send the model's current weights or an adapter to every actor; wait until all have loaded it."""
        self._version, self._adapter = version, None if adapter is None else ray.put(adapter)
        if adapter is None:
            self._weights = ray.put(export_weights(self._model))
        sent = (self._weights if adapter is None else None, version, self._adapter)
        calls = {host.actor.refresh.remote(*sent): host for host in self._hosts if host.started}
        late = ray.wait(list(calls), num_returns=len(calls), timeout=_RESPONSE_TIMEOUT)[1] if calls else []
        for call, host in calls.items():
            if call in late:
                self._drop_host(host, f"it took no weights in {_RESPONSE_TIMEOUT:g} s")
                continue
            try:
                ray.get(call)
            except RayError as error:
                self._handle_failure(host, error)
        # An actor that is still starting was given older weights. Ray runs its calls in order, so it loads
        # these before it sees the next requests.
        for host in self._hosts:
            if not host.started:
                host.actor.refresh.remote(*sent)

    def close(self) -> None:
        """Close the engines, end the actors and leave the cluster."""
        hosts, self._hosts = self._hosts, []
        if not is_lost():
            with suppress(RayError):
                if closing := [host.actor.close.remote() for host in hosts if host.started]:
                    ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT)
            for host in hosts:
                host.kill()
        self._host_of.clear()
        self._in_flight.clear()
        self._ready.clear()
        self._connection.close()

    def _least_loaded(self) -> "_Host":
        return min(self._hosts, key=lambda host: len(host.sequences))

    def _receive(self, host: "_Host") -> None:
        """Collect the generations that an actor returned, or handle its failure."""
        call, host.call = host.call, None
        try:
            answer = ray.get(call)
        except RayError as error:
            self._handle_failure(host, error)
            return
        host.started = True
        for number, generation in unpack_generations(answer):
            if self._in_flight.get(generation.sequence) == number:  # else the sequence was released meanwhile
                del self._in_flight[generation.sequence]
                self._ready.append(generation)

    # Actors

    def _start(self) -> None:
        actor = _Actor.options(num_cpus=self._config.actor_cpus, num_gpus=self._config.actor_gpus).remote(
            self._spec, self._weights, self._version, self._adapter
        )
        self._hosts.append(_Host(actor))

    def _wait_until_started(self) -> list[int]:
        """Wait until every actor has loaded its model; return the context limit of each."""
        try:
            found = ray.get([host.actor.max_context.remote() for host in self._hosts], timeout=_START_TIMEOUT)
        except GetTimeoutError:
            raise ConfigError(
                f"engine.actors={len(self._hosts)} did not start within {_START_TIMEOUT:g} s; check that "
                "other jobs leave enough CPUs and GPUs free (engine.actor_cpus, engine.actor_gpus)"
            ) from None
        except RayError as error:
            raise _user_error(error) or ConfigError(
                f"an engine actor cannot start: {short_reason(error)}"
            ) from None
        for host in self._hosts:
            host.started = True
        return cast(list[int], found)

    def _handle_failure(self, host: "_Host", error: RayError) -> None:
        """Raise an error that the user can fix; treat any other like the death of the actor."""
        if (own := _user_error(error)) is not None:
            raise own
        self._drop_host(host, short_reason(error))

    def _drop_host(self, host: "_Host", reason: str) -> None:
        """Remove an actor, answer its requests as lost, and start a replacement while restarts are left."""
        wait_for_head()  # without the head every actor seems lost, and no new one can start
        self._hosts.remove(host)
        host.kill()
        for sequence in host.sequences:
            self._host_of[sequence] = None
            if self._in_flight.pop(sequence, None) is not None:
                self._report_lost(sequence, f"its actor was lost: {reason}")
        if self.restarts < self._config.actor_restarts:
            self.restarts += 1
            self._start()
        elif not self._hosts:
            raise AgentRLError(
                f"an engine actor was lost: {reason}; it was the last one, and engine.actor_restarts="
                f"{self._config.actor_restarts} replacements are used up. Fix the cause, then go on from the "
                "last checkpoint: agentrl train --resume RUN"
            )

    def _report_lost(self, sequence: str, why: str) -> None:
        self._ready.append(Generation(sequence, policy_version=self._version, error=why, lost=True))


_Actor = ray.remote(EngineHost)


@dataclass(eq=False)
class _Host:
    """An actor with its sequences and the messages queued for it."""

    actor: Any
    sequences: set[str] = field(default_factory=set)
    outbox: dict[str, tuple[int, GenerationRequest]] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    started: bool = False
    call: Any = None  # the object reference of the call under way
    since: float = 0.0

    def start_call(self, name: str, *arguments: Any) -> None:
        """Call a method of the actor without waiting; `call` becomes the reference to its result."""
        self.since = time.monotonic()
        self.call = getattr(self.actor, name).remote(*arguments)

    def is_overdue(self) -> bool:
        """Return whether the call under way has taken so long that the actor counts as lost."""
        limit = _RESPONSE_TIMEOUT if self.started else _START_TIMEOUT + _RESPONSE_TIMEOUT
        return self.call is not None and time.monotonic() - self.since > limit

    def kill(self) -> None:
        """End the actor."""
        with suppress(Exception):  # it may be dead, and its machine with it
            ray.kill(self.actor)


def _user_error(error: RayError) -> AgentRLError | None:
    """Return the error of ours that an actor raised, which its user can fix; None for any other failure."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, AgentRLError) else None
