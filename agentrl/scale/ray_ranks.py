"""The processes that learn together as Ray actors, on a cluster where nobody starts torchrun.

Each actor sets the variables that torchrun would have set, and then does what torchrun's processes do.
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
from agentrl.scale.cluster import check_cluster, check_room, connected, in_short, is_lost

T = TypeVar("T")

_START = 300.0  # seconds that the actors have to be there
_LOOK = 0.2  # seconds between two looks at what the first rank printed
_GRACE = 30.0  # seconds that ranks have to end by themselves when one of them has failed


def run_on_ray(work: Callable[[], T], count: int, *, address: str | None = None, gpus: float = 0.0) -> T:
    """Do the same on several ranks, see `learn.ranks.process_group`; wait, and show what the first prints.

    Ctrl-C here is a SIGTERM there, once; at the second one the ranks are killed.

    Args:
        work: what each rank does; cloudpickle can send it.
        count: of ranks.
        address: of the cluster; see `RayConfig`.
        gpus: of each rank, 0 or 1.

    Returns:
        What it came to on the first rank.

    Raises:
        ConfigError: there is no cluster, or it is smaller than what is asked.
        AgentRLError: what `work` raised, or a rank was lost.
        KeyboardInterrupt: what `work` made of an interrupt.
    """
    with connected(address):
        check_room("learner.processes", count, gpus=gpus)
        screen = Queue(actor_options={"num_cpus": 0})
        options = {"num_cpus": 0, "num_gpus": gpus}
        same = sys.path, os.getcwd(), loaded_imports(), logging.getLogger("agentrl").level
        actors = [_Rank.options(**options).remote(*same) for _ in range(count)]
        try:
            ranks = _placed(actors)
            sealed = cloudpickle.dumps(work)
            calls = {
                rank.actor.run.remote(rank.variables, sealed, None if number else screen): number
                for number, rank in enumerate(ranks)
            }
            try:
                return cast(T, _results(calls, ranks, screen)[0])
            except KeyboardInterrupt:
                for rank in ranks:
                    rank.interrupt()
                return cast(T, _results(calls, ranks, screen)[0])
        finally:
            if not is_lost():
                for actor in actors:
                    with suppress(Exception):  # it may be dead already
                        ray.kill(cast(Any, actor))
                screen.shutdown(force=True)


class RankHost:
    """What an actor runs: a process among its equals.

    Args:
        path: of the driver's imports.
        folder: that the driver is in; where it exists, relative paths mean the same here.
        imports: of the driver, see `agentrl.plugins`.
        level: of the driver's logger.
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
        """Its machine, that one's address, its accelerators, a free port and the process."""
        context = ray.get_runtime_context()
        accelerators = [str(each) for each in context.get_accelerator_ids().get("GPU", [])]
        address = cast(Any, ray.util).get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        return context.get_node_id(), address, accelerators, port, os.getpid()

    def run(
        self, variables: dict[str, str], work: bytes, screen: Queue | None
    ) -> tuple[Any, BaseException | None]:
        """Do the work; its result, or what it raised on purpose."""
        os.environ.update(variables)
        with redirect_stdout(_Screen(screen)):
            try:
                load_imports(self._imports)  # what is in `work` may be of theirs
                return cloudpickle.loads(work)(), None
            except (AgentRLError, KeyboardInterrupt) as error:  # Ray would end the process at an interrupt
                return None, error


def terminate(process: int) -> None:
    """Ask a process of this machine to stop."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


_Rank, _terminate = ray.remote(RankHost), ray.remote(terminate)


@dataclass(frozen=True)
class _Placed:
    """A rank, and where it is."""

    actor: Any
    machine: str
    address: str
    process: int
    variables: dict[str, str]

    def interrupt(self) -> None:
        """Ask it to stop. Ray's workers have SIGINT blocked."""
        there = NodeAffinitySchedulingStrategy(self.machine, soft=False)
        _terminate.options(num_cpus=0, scheduling_strategy=there).remote(self.process)


def _placed(actors: Sequence[Any]) -> list[_Placed]:
    """The ranks, those of a machine side by side, and the variables of each."""
    try:
        found = ray.get([actor.place.remote() for actor in actors], timeout=_START)
    except GetTimeoutError:
        raise ConfigError(
            f"learner.processes={len(actors)} did not start within {_START:g} s: are the GPUs that they ask "
            "for held by others?"
        ) from None
    except RayError as error:
        raise ConfigError(f"a rank cannot start: {in_short(error)}") from None
    machines = list(dict.fromkeys(machine for machine, *_ in found))
    ordered = sorted(zip(actors, found, strict=True), key=lambda each: machines.index(each[1][0]))
    _, (_, master, _, port, _) = ordered[0]
    ranks: list[_Placed] = []
    for number, (actor, (machine, address, _, _, process)) in enumerate(ordered):
        variables = {
            "RANK": str(number),
            "WORLD_SIZE": str(len(ordered)),
            "LOCAL_RANK": str(sum(rank.machine == machine for rank in ranks)),
            "MASTER_ADDR": master,
            "MASTER_PORT": str(port),
        }
        # Ray shows each process its own accelerator only; LOCAL_RANK counts those of all on the machine.
        shared = [each for _, (other, _, own, _, _) in ordered if other == machine for each in own]
        if shared:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(shared)
        ranks.append(_Placed(actor, machine, address, process, variables))
    return ranks


def _results(calls: dict[Any, int], ranks: Sequence[_Placed], screen: Queue) -> list[Any]:
    """What the ranks came to, in order; raises what the first of those that failed raised."""
    results: list[Any] = [None] * len(ranks)
    raised: dict[int, BaseException] = {}
    died: dict[int, BaseException] = {}
    failed: dict[int, BaseException] = {}
    waiting, until = list(calls), float("inf")
    while waiting and time.monotonic() < until:
        check_cluster()
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK)
        _show(screen)
        for call in done:
            number = calls[call]
            try:
                results[number], error = ray.get(call)
            except RayError as failure:
                error = AgentRLError(
                    f"rank {number} on {ranks[number].address} was lost: {in_short(failure)}; the run's "
                    "folder keeps its last checkpoint: agentrl train --resume FOLDER"
                )
                error.__cause__ = failure
                (failed if isinstance(failure, RayTaskError) else died)[number] = error
                continue
            if error is not None:
                raised[number] = error
        if raised or died or failed:
            until = min(until, time.monotonic() + _GRACE)
    _show(screen)
    for errors in (died, raised, failed):  # whoever loses touch with one that died fails as well
        if errors:
            raise errors[min(errors)]
    return results


def _show(screen: Queue) -> None:
    with suppress(Empty):
        while True:
            sys.stdout.write(screen.get_nowait())
            sys.stdout.flush()


class _Screen(io.TextIOBase):
    """Standard output whose reader is elsewhere, or nowhere."""

    def __init__(self, screen: Queue | None) -> None:
        self._screen = screen

    def write(self, text: str) -> int:
        if self._screen is not None:
            self._screen.put(text)
        return len(text)
