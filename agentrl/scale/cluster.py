"""The connection to Ray: made for its first user, ended with its last where it was ours to make."""

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

_PING_TIMEOUT = 5.0  # seconds; Ray itself would try for minutes, and not be interrupted
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # with empty settings
_SETTINGS_FRAME = 4  # a frame's type, in its fourth byte
_REASON_LENGTH = 200  # characters of what Ray says of a loss that go into an error


_CHECK_INTERVAL = 2.0  # seconds between two looks at whether the cluster's head is there
_LOST_AFTER = 15.0  # seconds without it; Ray itself ends the process after 60 without a word of advice


class _Connection:
    """How many use it, and whether it ends with them."""

    def __init__(self) -> None:
        self.users = 0
        self.ours = False
        self.address: str | None = None
        self.monitor: _HeadMonitor | None = None


class _HeadMonitor(threading.Thread):
    """Looks now and then whether the head is there: a process that does not call it would not learn.

    Args:
        head: its address.
    """

    def __init__(self, head: str) -> None:
        super().__init__(daemon=True)
        self.head = head
        self._over = threading.Event()
        self.lost: str | None = None  # why

    def run(self) -> None:
        last_seen = time.monotonic()
        while not self._over.wait(_CHECK_INTERVAL):
            try:
                ping(self.head)
                last_seen, self.lost = time.monotonic(), None
            except ConfigError:
                away = time.monotonic() - last_seen
                if away >= _LOST_AFTER and self.lost is None and not self._over.is_set():
                    self.lost = f"its head at {self.head} has not answered for {away:.0f} s"
                    # Whoever is busy elsewhere learns of it too late to say anything.
                    echo(f"warning: {cluster_lost(self.lost)}", err=True)

    def end(self) -> None:
        self._over.set()


_connection = _Connection()


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to Ray for the length of a `with` block; these may overlap.

    What a script has connected by itself is used, whatever the address, and left as it is.

    Args:
        address: of a cluster, "host:port", or "auto" for the one of this machine; None starts Ray on this
            machine, and stops it afterwards.

    Raises:
        ConfigError: no cluster answers there, or Ray does not start here.
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
            if _connection.ours:
                with _preserve_signal_handlers():
                    ray.shutdown()


def check_cluster() -> None:
    """Make sure that Ray is still there, as far as is known.

    Raises:
        ClusterLostError: it is not.
    """
    if _connection.monitor is not None and _connection.monitor.lost is not None:
        raise cluster_lost(_connection.monitor.lost)


def wait_for_head() -> None:
    """Wait until the head answers: what is asked of Ray without it hangs, and then ends the process.

    Raises:
        ClusterLostError: it does not, for as long as it is waited for.
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
    """Whether there is no use in asking it for anything."""
    return _connection.monitor is not None and _connection.monitor.lost is not None


def cluster_lost(why: str) -> ClusterLostError:
    """Build the error that says why Ray is lost, and what its user can do."""
    address = _connection.address
    if address is None and _connection.ours:
        start = "it is started again with the run"
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
    """Refuse more engine actors than there is room for, before anything is made for them.

    Args:
        config: of the engines.
        address: of the cluster; without one, Ray is not started to ask what this machine has.
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
    """The machines of the cluster that can do work: `ray start --num-cpus=0` keeps one free of it."""
    return [node for node in cast(Any, ray).nodes() if node["Alive"] and node["Resources"].get("CPU")]


def check_capacity(
    key: str,
    count: int,
    *,
    cpus: float = 0.0,
    gpus: float = 0.0,
    offered: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Refuse more actors than the machines of the cluster hold.

    Args:
        key: of the configuration.
        count: of actors.
        cpus: of each.
        gpus: of each.
        offered: what each machine has; None asks the cluster.

    Raises:
        ConfigError: one line that says what there is.
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
    """The cause of a loss, with which Ray ends what it has to say."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:_REASON_LENGTH]


def _connect(address: str | None) -> None:
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"address": "local", "include_dashboard": False}
    elif address != "auto":
        ping(address)
    try:
        with _preserve_signal_handlers():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        where = "Ray does not start on this machine" if address is None else f"no Ray cluster at {address}"
        raise ConfigError(f"rollout.ray.address: {where}: {type(error).__name__}: {error}") from error


def ping(address: str) -> None:
    """Find out in a few seconds whether somebody listens who speaks HTTP/2, as Ray's head does.

    Raises:
        ConfigError: nobody does.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PING_TIMEOUT) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        raise ConfigError(f"rollout.ray.address: nothing answers at {address}: {error}") from error
    if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
        raise ConfigError(f"rollout.ray.address: what answers at {address} is no Ray cluster")


@contextmanager
def _preserve_signal_handlers() -> Iterator[None]:
    """Keep the handlers of this process: Ray puts its own in their place."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
