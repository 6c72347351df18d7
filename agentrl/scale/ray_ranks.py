"""Learner ranks as Ray actors: a replacement for torchrun on a cluster.

Each actor sets the environment variables that torchrun would set, and then does the same work.
"""

import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import cloudpickle
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agentrl.errors import AgentRLError, ConfigError
from agentrl.plugins import load_imports, loaded_imports
from agentrl.scale.cluster import check_capacity, check_cluster, connected, is_lost, short_reason

T = TypeVar("T")

_START_TIMEOUT = 300.0  # seconds for the actors to start
_POLL_INTERVAL = 0.2  # seconds between two reads of the first rank's output
_GRACE_PERIOD = 30.0  # seconds for the other ranks to end by themselves after one has failed


def run_on_ray(work: Callable[[], T], count: int, *, address: str | None = None, gpus: float = 0.0) -> T:
    """Run a function on several ranks, see `learn.ranks.process_group`, and print the first rank's output.

    The first Ctrl-C is passed on to the ranks as SIGTERM; the second one kills them.

    Args:
        work: The function that each rank runs; cloudpickle must be able to send it.
        count: The number of ranks.
        address: The address of the cluster; see `RayConfig`.
        gpus: The number of GPUs of each rank, 0 or 1.

    Returns:
        The result of the first rank.

    Raises:
        ConfigError: If there is no cluster, or it is too small.
        AgentRLError: If `work` raised it, or a rank was lost.
        KeyboardInterrupt: If `work` raised it after an interrupt.
    """
    with connected(address):
        check_capacity("learner.processes", count, gpus=gpus)
        output = Queue(actor_options={"num_cpus": 0})
        options = {"num_cpus": 0, "num_gpus": gpus}
        same = sys.path, os.getcwd(), loaded_imports(), logging.getLogger("agentrl").level
        actors = [_RankActor.options(**options).remote(*same) for _ in range(count)]
        try:
            ranks = _assign_ranks(actors)
            pickled = cloudpickle.dumps(work)
            calls = {
                rank.actor.run.remote(rank.variables, pickled, None if number else output): number
                for number, rank in enumerate(ranks)
            }
            try:
                return cast(T, _wait_for_results(calls, ranks, output)[0])
            except KeyboardInterrupt:
                for rank in ranks:
                    rank.interrupt()
                return cast(T, _wait_for_results(calls, ranks, output)[0])
        finally:
            if not is_lost():
                for actor in actors:
                    with suppress(Exception):  # it may be dead already
                        ray.kill(cast(Any, actor))
                output.shutdown(force=True)


class RankHost:
    """Actor class: the process of one rank.

    Args:
        path: The driver's `sys.path`.
        folder: The driver's working directory, entered where it exists, so that relative paths agree.
        imports: The driver's imported plugins, see `agentrl.plugins`.
        level: The level of the driver's logger.
    """

    def __init__(
        self, path: Sequence[str], folder: str, imports: Sequence[str] = (), level: int = logging.NOTSET
    ) -> None:
        self._imports = imports
        logging.getLogger("agentrl").setLevel(level)
        sys.path.extend(entry for entry in path if entry not in sys.path)
        if os.path.isdir(folder):
            os.chdir(folder)

    def place(self) -> tuple[str, str, list[str], int, int]:
        """Return the node id, its address, the ids of the actor's GPUs, a free port and the process id."""
        context = ray.get_runtime_context()
        accelerators = [str(each) for each in context.get_accelerator_ids().get("GPU", [])]
        address = cast(Any, ray.util).get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        return context.get_node_id(), address, accelerators, port, os.getpid()

    def run(
        self, variables: dict[str, str], work: bytes, output: Queue | None
    ) -> tuple[Any, BaseException | None]:
        """Run the pickled function; return its result, and the error if it raised one of ours."""
        os.environ.update(variables)
        with redirect_stdout(_QueueWriter(output)):
            try:
                load_imports(self._imports)  # `work` may need their definitions
                return cloudpickle.loads(work)(), None
            except (AgentRLError, KeyboardInterrupt) as error:  # Ray ends the process at an interrupt
                return None, error


def terminate(process: int) -> None:
    """Send SIGTERM to a process on this machine."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


_RankActor, _terminate = ray.remote(RankHost), ray.remote(terminate)


@dataclass(frozen=True)
class _PlacedRank:
    """A rank with its actor, node and environment variables."""

    actor: Any
    machine: str
    address: str
    process: int
    variables: dict[str, str]

    def interrupt(self) -> None:
        """Send SIGTERM to the rank, since Ray's workers block SIGINT."""
        there = NodeAffinitySchedulingStrategy(self.machine, soft=False)
        _terminate.options(num_cpus=0, scheduling_strategy=there).remote(self.process)


def _assign_ranks(actors: Sequence[Any]) -> list[_PlacedRank]:
    """Assign ranks to actors, consecutive ones on the same machine, and the variables of each."""
    try:
        found = ray.get([actor.place.remote() for actor in actors], timeout=_START_TIMEOUT)
    except GetTimeoutError:
        raise ConfigError(
            f"learner.processes={len(actors)} did not start within {_START_TIMEOUT:g} s; check that other "
            "jobs leave enough GPUs free"
        ) from None
    except RayError as error:
        raise ConfigError(f"a rank cannot start: {short_reason(error)}") from None
    machines = list(dict.fromkeys(machine for machine, *_ in found))
    ordered = sorted(zip(actors, found, strict=True), key=lambda each: machines.index(each[1][0]))
    _, (_, master, _, port, _) = ordered[0]
    ranks: list[_PlacedRank] = []
    for number, (actor, (machine, address, _, _, process)) in enumerate(ordered):
        variables = {
            "RANK": str(number),
            "WORLD_SIZE": str(len(ordered)),
            "LOCAL_RANK": str(sum(rank.machine == machine for rank in ranks)),
            "MASTER_ADDR": master,
            "MASTER_PORT": str(port),
        }
        # Ray hides the other ranks' GPUs from each process, but LOCAL_RANK indexes all of the machine's.
        shared = [each for _, (other, _, own, _, _) in ordered if other == machine for each in own]
        if shared:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(shared)
        ranks.append(_PlacedRank(actor, machine, address, process, variables))
    return ranks


def _wait_for_results(calls: dict[Any, int], ranks: Sequence[_PlacedRank], output: Queue) -> list[Any]:
    """Wait for the ranks and return their results in order, or raise the error of the first that failed."""
    results: list[Any] = [None] * len(ranks)
    raised: dict[int, BaseException] = {}
    died: dict[int, BaseException] = {}
    failed: dict[int, BaseException] = {}
    waiting, until = list(calls), float("inf")
    while waiting and time.monotonic() < until:
        check_cluster()
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_INTERVAL)
        _print_output(output)
        for call in done:
            number = calls[call]
            try:
                results[number], error = ray.get(call)
            except RayError as failure:
                error = AgentRLError(
                    f"rank {number} on {ranks[number].address} was lost: {short_reason(failure)}; the run's "
                    "folder keeps its last checkpoint: agentrl train --resume FOLDER"
                )
                error.__cause__ = failure
                (failed if isinstance(failure, RayTaskError) else died)[number] = error
                continue
            if error is not None:
                raised[number] = error
        if raised or died or failed:
            until = min(until, time.monotonic() + _GRACE_PERIOD)  # counts from the first failure
    _print_output(output)
    for errors in (died, raised, failed):  # a rank that died makes the others fail too
        if errors:
            raise errors[min(errors)]
    return results


def _print_output(output: Queue) -> None:
    """Write the text that is in the queue to standard output."""
    with suppress(Empty):
        while True:
            sys.stdout.write(output.get_nowait())
            sys.stdout.flush()


class _QueueWriter(io.TextIOBase):
    """Text stream that puts what is written into a queue, or discards it where there is none."""

    def __init__(self, output: Queue | None) -> None:
        self._output = output

    def write(self, text: str) -> int:
        """Put text into the queue; return its length."""
        if self._output is not None:
            self._output.put(text)
        return len(text)
