"""The process-wide connection to Ray: opened for its first user, closed after its last."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import ray
import torch

from agentrl.errors import ClusterLostError, ConfigError
from agentrl.policy.settings import EngineConfig
from agentrl.terminal import echo

_PING_TIMEOUT = 5.0  # seconds; Ray itself tries for minutes and cannot be interrupted
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # with empty settings
_SETTINGS_FRAME = 4  # the frame type, in the fourth byte
_REASON_LENGTH = 200  # characters of Ray's reason that go into an error message


_CHECK_INTERVAL = 2.0  # seconds between two pings of the cluster's head
_LOST_AFTER = 15.0  # seconds without an answer; Ray itself ends the process after 60, without advice


class _Connection:
    """State of the connection: the number of its users, and whether they opened it."""

    def __init__(self) -> None:
        self.users = 0
        self.ours = False
        self.address: str | None = None
        self.monitor: _HeadMonitor | None = None


class _HeadMonitor(threading.Thread):
    """Thread that pings the head regularly, since a process that makes no calls would not notice its loss.

    Args:
        head: The address of the head, "host:port".
    """

    def __init__(self, head: str) -> None:
        super().__init__(daemon=True)
        self.head = head
        self._over = threading.Event()
        self.lost: str | None = None  # the reason, once the head is lost

    def run(self) -> None:
        """Ping the head until `end`, and warn once when it is lost."""
        last_seen = time.monotonic()
        while not self._over.wait(_CHECK_INTERVAL):
            try:
                ping(self.head)
                last_seen, self.lost = time.monotonic(), None
            except ConfigError:
                away = time.monotonic() - last_seen
                if away >= _LOST_AFTER and self.lost is None and not self._over.is_set():
                    self.lost = f"its head at {self.head} has not answered for {away:.0f} s"
                    # A main thread inside a Ray call may be ended by Ray before it can print this.
                    echo(f"warning: {cluster_lost(self.lost)}", err=True)

    def end(self) -> None:
        """Stop the thread before its next ping."""
        self._over.set()


_connection = _Connection()  # Ray has one connection per process


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Keep this process connected to Ray during a `with` block; blocks may overlap.

    A connection that the script itself has opened is used, whatever the address, and left open.

    Args:
        address: The address of a cluster, "host:port", or "auto" for the one on this machine; None starts
            Ray on this machine and stops it afterwards.

    Raises:
        ConfigError: If no cluster answers there, or Ray does not start here.
    """
    if not _connection.users:
        _connection.ours = not ray.is_initialized()
        if _connection.ours:
            _connect(address)
        _connection.address = address
        _connection.monitor = _HeadMonitor(ray.get_runtime_context().gcs_address)
        _connection.monitor.start()
    _connection.users += 1
    try:
        yield
    finally:
        _connection.users -= 1
        if not _connection.users:
            if _connection.monitor is not None:
                _connection.monitor.end()
            # A connection that the script opened before stays open.
            if _connection.ours:
                with _preserve_signal_handlers():
                    ray.shutdown()


def check_cluster() -> None:
    """Raise if the monitor has found the cluster to be lost.

    Raises:
        ClusterLostError: If the head has not answered for too long.
    """
    if _connection.monitor is not None and _connection.monitor.lost is not None:
        raise cluster_lost(_connection.monitor.lost)


def wait_for_head() -> None:
    """Wait until the head answers a ping: a call to Ray without it hangs, and then ends the process.

    Raises:
        ClusterLostError: If the head has not answered for too long.
    """
    while (monitor := _connection.monitor) is not None:
        check_cluster()
        try:
            ping(monitor.head)
        except ConfigError:
            time.sleep(0.2)
        else:
            return


def is_lost() -> bool:
    """Return whether the cluster is known to be lost, so that calls to it would hang."""
    return _connection.monitor is not None and _connection.monitor.lost is not None


def cluster_lost(why: str) -> ClusterLostError:
    """Build the error that says why Ray is lost, and what the user can do."""
    address = _connection.address
    if address is None and _connection.ours:
        start = "it starts again with the run"
    elif address in (None, "auto"):
        start = "start it again with: ray stop --force; ray start --head"
    else:
        start = (
            f"start it again with: ray stop --force; ray start --head --port={address.rpartition(':')[2]}"
            f" (on other machines: ray start --address={address})"
        )
    return ClusterLostError(
        f"Ray is lost: {why}; {start}. Then go on from the last checkpoint: agentrl train --resume RUN"
    )


def check_actors(config: EngineConfig, address: str | None) -> None:
    """Refuse engine actors that do not fit on the cluster, before anything is made for them.

    Args:
        config: The configuration of the engines.
        address: The address of the cluster; None checks this machine's resources without starting Ray.

    Raises:
        ConfigError: If there is no cluster, or it has too few CPUs or GPUs.
    """
    if config.actors is None:
        return
    here = None
    if address is None and not ray.is_initialized():
        here = [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]
    with connected(address) if here is None else nullcontext():
        cpus, gpus = config.actor_cpus, config.actor_gpus
        check_capacity("engine.actors", config.actors, cpus=cpus, gpus=gpus, offered=here)


def machines() -> list[dict[str, Any]]:
    """Return the nodes of the cluster that accept work; `ray start --num-cpus=0` makes one that does not."""
    return [node for node in cast(Any, ray).nodes() if node["Alive"] and node["Resources"].get("CPU")]


def check_capacity(
    key: str,
    count: int,
    *,
    cpus: float = 0.0,
    gpus: float = 0.0,
    offered: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Refuse more actors than the machines of the cluster can hold.

    Args:
        key: The configuration key that sets the number of actors.
        count: The number of actors.
        cpus: The number of CPUs of each actor.
        gpus: The number of GPUs of each actor.
        offered: The resources of each machine; None asks the cluster.

    Raises:
        ConfigError: If they do not fit, with the resources that there are.
    """
    if offered is None:
        offered = [node["Resources"] for node in machines()]
    if not offered:
        raise ConfigError(f"{key} is {count}, but no machine of the cluster has a CPU to offer")
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        there = [machine.get(kind, 0.0) for machine in offered]
        if each and (most := sum(int(amount // each) for amount in there)) < count:
            raise ConfigError(
                f"{key} is {count}, each with {each:g} {kind}s, wanted at most {most}: the cluster's "
                f"machines have {', '.join(f'{amount:g}' for amount in there)} {kind}s"
            )


def short_reason(error: Exception) -> str:
    """Return the last line of an error, in which Ray names the cause, cut to a readable length."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:_REASON_LENGTH]


def _connect(address: str | None) -> None:
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # report nothing from a cluster of our own
        options = {"address": "local", "include_dashboard": False}
    elif address != "auto":
        ping(address)
    try:
        with _preserve_signal_handlers():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()  # a failed start may leave processes behind
        where = "Ray does not start on this machine" if address is None else f"no Ray cluster at {address}"
        raise ConfigError(f"rollout.ray.address: {where}: {type(error).__name__}: {error}") from error


def ping(address: str) -> None:
    """Check within seconds that an HTTP/2 server, as Ray's head is, answers at an address.

    Raises:
        ConfigError: If nothing answers there, or something that does not speak HTTP/2.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PING_TIMEOUT) as connection:
            # A head with TLS answers nothing before a handshake, so only the connection is checked.
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        raise ConfigError(f"rollout.ray.address: nothing answers at {address}: {error}") from error
    if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
        raise ConfigError(f"rollout.ray.address: the server at {address} is not a Ray cluster")


@contextmanager
def _preserve_signal_handlers() -> Iterator[None]:
    """Restore this process's signal handlers after the block, in which Ray replaces them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
