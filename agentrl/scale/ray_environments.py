"""Environments on the machines of a Ray cluster, behind actors that are called in batches.

An actor runs the worker processes of `rollout.workers` on its machine, which handle the failures of an
environment. This module handles the loss of an actor or a machine, which no episode is blamed for.
"""

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import cloudpickle
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agentrl.data.trajectory import StopReason
from agentrl.errors import ConfigError
from agentrl.rollout.environments import Answered, Environments, Make, RemoteEnv, TextGym
from agentrl.rollout.play import EnvironmentCall, Step, Stop
from agentrl.rollout.settings import RayConfig, WorkersConfig
from agentrl.rollout.workers import EnvironmentLostError
from agentrl.scale.cluster import (
    check_capacity,
    check_cluster,
    cluster_lost,
    connected,
    is_lost,
    machines,
    short_reason,
    wait_for_head,
)
from agentrl.scale.environment_host import (
    EnvironmentHost,
    Message,
    Release,
    Report,
    pack_call,
    unpack_result,
)
from agentrl.scale.messages import replies_to_await

_REPLY_TARGET = 16  # answers for which an actor returns a message at once
_MAX_WAIT = 0.1  # seconds that an answer waits for others
_CHECK_INTERVAL = 2.0  # seconds between two checks that the cluster is there
_RESPONSE_TIMEOUT = 60.0  # seconds beyond the workers' own deadlines after which an actor counts as lost


class RayEnvironments(Environments):
    """Environments in worker processes on several machines.

    The actors have started when the constructor returns; one that is lost later is replaced while the others
    continue.

    Args:
        make: The factory of environments; see `ProcessEnvironments`.
        capacity: The number of episodes played at a time, on all machines together.
        workers: The configuration of each actor's workers.
        config: The cluster, and the number of actors.

    Attributes:
        messages: The number of messages with requests sent to actors.

    Raises:
        ConfigError: If there is no cluster, it is too small, or an actor cannot start.
    """

    capacity: int

    def __init__(
        self, make: Make, capacity: int, workers: WorkersConfig | None = None, config: RayConfig | None = None
    ) -> None:
        self._make, self._most = cloudpickle.dumps(make), capacity
        self._workers, self._config = workers or WorkersConfig(), config or RayConfig()
        self.messages = 0
        self._replaced = 0
        self._borrow_count = 0
        self._hosts: list[_Host] = []
        self._host_of: dict[str, _Host | None] = {}  # by episode; None where its actor is lost
        self._backlog: deque[tuple[str, EnvironmentCall]] = deque()
        self._ready: deque[Answered] = deque()
        self._connection = ExitStack()
        self._open()

    # Interface of `Environments`

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Queue a call for the episode's actor; an episode that has none yet waits for a free place.

        Raises:
            ValueError: For a step of an episode that is not being played.
        """
        host = self._host_of.get(episode)
        if host is not None:
            host.request(episode, effect)
        elif episode in self._host_of:
            lost = "its actor was lost between two of its calls"
            self._ready.append((episode, Stop(StopReason.WORKER_ERROR, lost, bystander=True)))
        elif isinstance(effect, Step):
            raise ValueError(f"{episode!r} is not being played, so it cannot step")
        else:
            self._backlog.append((episode, effect))

    def poll(self, *, wait: bool, max_wait: float = math.inf) -> Sequence[Answered]:
        """Exchange messages with the actors and return the answers so far.

        Args:
            wait: Whether to wait until there is an answer, if any is expected.
            max_wait: The maximum time to wait, in seconds.
        """
        self._open()
        check_cluster()
        until = time.monotonic() + max_wait
        self._exchange(0.0, hurry=wait)
        while wait and not self._ready and self._expects_answers():
            if (left := until - time.monotonic()) <= 0:
                break
            self._exchange(min(left, _CHECK_INTERVAL), hurry=True)
            check_cluster()
        answers = list(self._ready)
        self._ready.clear()
        return answers

    def release(self, episode: str, *, broken: bool = False) -> None:
        """Free the environment of an episode; a broken one is not used again."""
        host = self._host_of.pop(episode, None)
        if host is not None:
            del host.playing[episode]
            host.outbox.append((episode, Release(broken)))

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        """Reserve an environment for direct calls during a `with` block.

        Raises:
            RuntimeError: If every place is taken by an episode.
        """
        self._open()
        host = self._free_host()
        if host is None:
            raise RuntimeError("every place is being played in; borrow before or after a collection")
        self._borrow_count += 1
        number = self._borrow_count
        self._call_now(host, "borrow", number)
        host.borrowed += 1
        broken = True
        try:
            yield cast(TextGym, RemoteEnv(lambda *asked: self._call_now(host, "ask", number, *asked)))
            broken = False
        finally:
            host.borrowed -= 1
            if host in self._hosts:
                self._call_now(host, "give_back", number, broken)

    def close(self) -> None:
        """End the workers and actors, and leave the cluster."""
        hosts, self._hosts = self._hosts, []
        if not is_lost():
            with suppress(RayError):
                closing = [host.actor.call.remote(pack_call("close", ())) for host in hosts if host.capacity]
                if closing:
                    ray.wait(closing, num_returns=len(closing), timeout=_RESPONSE_TIMEOUT)
            for host in hosts:
                host.kill()
        self._host_of.clear()
        self._backlog.clear()
        self._ready.clear()
        self._connection.close()

    # Requests and answers

    def _expects_answers(self) -> bool:
        """Return whether an answer will come: a call is in flight, or a waiting episode can get a place."""
        waiting = bool(self._backlog)
        return any(
            any(host.playing.values()) or (waiting and (not host.capacity or host.taken < host.capacity))
            for host in self._hosts
        )

    def _exchange(self, timeout: float, *, hurry: bool) -> None:
        """Send due messages, and collect the answers that come before `timeout` or a deadline."""
        self._assign_backlog()
        for host in self._hosts:
            if host.call is None and host.is_due(hurry):
                messages, host.outbox = host.outbox, []
                host.start_call(_RESPONSE_TIMEOUT, "exchange", messages, _REPLY_TARGET, _MAX_WAIT)
                self.messages += 1
        calls = {host.call: host for host in self._hosts if host.call is not None}
        if not calls:
            return
        patience = min(host.deadline for host in calls.values()) - time.monotonic()
        if ray.wait(list(calls), timeout=max(0.0, min(timeout, patience)))[0]:
            for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
                self._receive(calls[call])
        now = time.monotonic()
        for host in [host for host in calls.values() if host.call is not None and now >= host.deadline]:
            self._drop_host(host, f"no answer in {host.limit:g} s")

    def _assign_backlog(self) -> None:
        while self._backlog and (host := self._free_host()) is not None:
            episode, call = self._backlog.popleft()
            self._host_of[episode] = host
            host.request(episode, call)

    def _free_host(self) -> "_Host | None":
        """Return the actor with the smallest share of its places taken; None where all are full."""
        free = [host for host in self._hosts if host.taken < host.capacity]
        return min(free, key=lambda host: host.taken / host.capacity, default=None)

    def _receive(self, host: "_Host") -> None:
        """Collect what an actor returned, or handle its loss."""
        call, host.call, host.waiting = host.call, None, time.monotonic()
        try:
            outcome = unpack_result(ray.get(call))
        except RayError as error:
            self._drop_host(host, short_reason(error))
            return
        if not host.capacity:  # the first call of an actor asks for its capacity
            host.capacity = outcome
            return
        report = cast(Report, outcome)
        host.playing.update((episode, False) for episode, _ in report.answers)
        self._ready.extend(report.answers)
        # An actor counts from its own start, so only the growth is added.
        self.restarts += report.restarts - host.restarts
        self.recycled += report.recycled - host.recycled
        host.restarts, host.recycled = report.restarts, report.recycled

    def _call_now(self, host: "_Host", name: str, *arguments: Any) -> Any:
        """Call a method of an actor and wait for its result.

        Raises:
            EnvironmentLostError: If the actor is lost.
        """
        if host in self._hosts:
            config = self._workers
            limit = _RESPONSE_TIMEOUT + max(
                config.construct_timeout, config.reset_timeout, config.step_timeout
            )
            try:
                return unpack_result(
                    ray.get(host.actor.call.remote(pack_call(name, arguments)), timeout=limit)
                )
            except RayError as error:
                self._drop_host(host, short_reason(error))
        raise EnvironmentLostError(f"{name}: {host.exit_reason}")

    # Actors

    def _open(self) -> None:
        """Connect to the cluster and start the actors, unless they have started."""
        if self._hosts:
            return
        self.capacity = 0
        self._connection.enter_context(connected(self._config.address))
        try:
            count = self._config.actors or max(1, len(machines()))
            check_capacity("rollout.ray.actors", count, cpus=self._config.cpus)
            self._share = -(-self._most // count)
            for _ in range(count):
                self._start()
            while any(not host.capacity for host in self._hosts):
                self._exchange(_CHECK_INTERVAL, hurry=False)
                check_cluster()
        except BaseException:
            self.close()
            raise
        self.capacity = min(self._most, sum(host.capacity for host in self._hosts))

    def _start(self) -> None:
        """Start an actor on the machine with the fewest; it plays nothing before it reports its capacity."""
        taken = Counter(host.node for host in self._hosts)
        there = machines()
        if not there:
            raise cluster_lost("no machine of the cluster is alive")
        node = min(there, key=lambda each: taken[each["NodeID"]])
        # Soft, since a machine may be gone before Ray knows.
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        actor = _Actor.options(num_cpus=self._config.cpus, scheduling_strategy=where).remote(
            self._make, self._share, self._workers, sys.path
        )
        host = _Host(actor, node["NodeID"], node["NodeManagerAddress"])
        host.start_call(self._workers.construct_timeout, "capacity")
        self._hosts.append(host)

    def _drop_host(self, host: "_Host", reason: str) -> None:
        """Remove an actor, answer its calls as lost, and start a replacement while restarts are left."""
        if host not in self._hosts:
            return
        wait_for_head()  # without the head every actor seems lost, and no new one can start
        self._hosts.remove(host)
        host.kill()
        host.exit_reason = f"the actor on {host.machine} was lost: {reason}"
        if not self.capacity:  # while the first actors start, a failure is one of the configuration
            raise ConfigError(f"an environment actor cannot start on {host.machine}: {reason}")
        self.restarts += 1
        for episode, owed in host.playing.items():
            self._host_of[episode] = None
            if owed:
                self._ready.append((episode, Stop(StopReason.WORKER_ERROR, host.exit_reason, bystander=True)))
        if self._replaced < self._config.max_restarts:
            self._replaced += 1
            try:
                self._start()
            except RayError as error:
                raise cluster_lost(
                    f"{host.exit_reason}, and no other starts: {short_reason(error)}"
                ) from error
        elif not self._hosts:
            raise EnvironmentLostError(
                f"{host.exit_reason}; it was the last one, and rollout.ray.max_restarts="
                f"{self._config.max_restarts} replacements are used up. Fix the cause, then go on from the "
                "last checkpoint: agentrl train --resume RUN"
            )


_Actor = ray.remote(EnvironmentHost)


@dataclass(eq=False)
class _Host:
    """An actor with its episodes and the messages queued for it."""

    actor: Any
    node: str
    machine: str  # the address of the node
    capacity: int = 0  # 0 until the actor has started
    playing: dict[str, bool] = field(default_factory=dict)  # by episode: whether an answer is expected
    borrowed: int = 0
    outbox: list[Message] = field(default_factory=list)
    waiting: float = 0.0  # since when calls wait to be sent, or answers to be fetched
    call: Any = None  # the object reference of the call under way
    since: float = 0.0
    limit: float = 0.0
    restarts: int = 0
    recycled: int = 0
    exit_reason: str = ""

    @property
    def deadline(self) -> float:
        """Return the time by which the call under way must have returned."""
        return self.since + self.limit

    @property
    def taken(self) -> int:
        """Return the number of places in use."""
        return len(self.playing) + self.borrowed

    def request(self, episode: str, call: EnvironmentCall) -> None:
        """Queue a call of an episode for the next message."""
        if not any(self.playing.values()):
            self.waiting = time.monotonic()
        self.outbox.append((episode, call))
        self.playing[episode] = True

    def is_due(self, hurry: bool) -> bool:
        """Return whether to send a message now: `hurry`, enough calls, or a long enough wait."""
        owed = sum(self.playing.values())
        waited = time.monotonic() - self.waiting >= _MAX_WAIT
        return owed > 0 and (hurry or waited or owed >= replies_to_await(_REPLY_TARGET, len(self.playing)))

    def start_call(self, limit: float, name: str, *arguments: Any) -> None:
        """Call a method of the actor without waiting; its result is due within `limit` seconds."""
        self.since, self.limit = time.monotonic(), limit
        self.call = self.actor.call.remote(pack_call(name, arguments))

    def kill(self) -> None:
        """Kill the actor; its workers end by themselves when it is gone."""
        with suppress(Exception):  # it may be dead, and its machine with it
            ray.kill(self.actor)
