"""What a run lacks on this machine: each check yields one line for each thing, and starts nothing."""

import os
import shutil
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal

from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.env.registry import check_id
from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.learner import provided
from agentrl.learn.lora import check_adapters
from agentrl.planning.memory import cache_bytes, weight_bytes
from agentrl.planning.topology import Shares
from agentrl.policy.model import context_length, skeleton
from agentrl.policy.settings import EngineConfig
from agentrl.run.settings import RunConfig, rank_mistakes
from agentrl.scale.engines import check_actors, check_engine, check_server
from agentrl.scale.extras import check_ray

_RENDEZVOUS = 29500  # torchrun's port unless told otherwise
_KNOCK_TIMEOUT = 5.0  # seconds


class Missing(list[str]):
    """One line for each thing that is missing."""

    def look(self, found: Iterator[str]) -> None:
        """Take in what a check finds."""
        with self.noted():
            for line in found:
                self.add(line)

    def add(self, line: str) -> None:
        """Take it in once."""
        if line not in self:
            self.append(line)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What goes wrong in a foreseen way is one thing more."""
        try:
            yield
        except (AgentRLError, OSError) as error:
            self.add(str(error))


def of_ranks(config: RunConfig, shares: Shares) -> Iterator[str]:
    """What several processes could not share, and the port that torchrun meets at."""
    if shares.ranks == 1:
        return
    yield from rank_mistakes(config, shares.ranks)
    if config.learner.launcher == "ray":
        if shares.nodes > 1 and config.rollout.ray.address is None:
            yield (
                "rollout.ray.address is null, which starts Ray on this machine alone, wanted that of a "
                f"cluster of {shares.nodes}"
            )
        return
    port = int(os.environ.get("MASTER_PORT", _RENDEZVOUS))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield f"torchrun --master-port: {port} cannot be had ({error.strerror}); choose another"


def of_folders(config: RunConfig) -> Iterator[str]:
    """Where the run would be kept."""
    block = config.run
    folder = Path(block.folder)
    if block.name is not None and (folder / block.name).exists():
        yield f"run.name is {block.name!r}, but {folder / block.name} exists; resume it or choose another"
    there = _existing(folder)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        yield f"run.folder is {block.folder!r}, which cannot hold runs: {there} is no folder to write to"


def of_engine(config: RunConfig) -> Iterator[str]:
    """Whoever generates, as far as it is on this machine or has an address."""
    block = config.engine.vllm
    if config.engine.name != "vllm" or block.url is None:
        return
    try:
        urllib.request.urlopen(f"{block.url.rstrip('/')}/health", timeout=_KNOCK_TIMEOUT).close()
    except (OSError, HTTPException) as error:
        yield f"engine.vllm.url: no server that is well answers at {block.url} ({error})"
    if block.weights_folder is not None and not Path(block.weights_folder).is_dir():
        yield f"engine.vllm.weights_folder: {block.weights_folder} is no folder on this machine"


def of_cluster(config: RunConfig, shares: Shares, device: torch.device) -> Iterator[str]:
    """The cluster that is asked for, and whether all actors fit: those of the panel are there as well."""
    engine, block = config.engine, config.rollout.ray
    asked = {
        "rollout.backend=ray": config.rollout.backend == "ray",
        f"engine.actors={engine.actors}": engine.actors is not None,
        "learner.launcher=ray": config.learner.launcher == "ray",
    }
    if not shares.ray:
        return
    check_ray(", ".join(who for who, holds in asked.items() if holds))
    near = config.learner.launcher == "ray" or block.address is None  # where the actors are as well
    learners = shares.ranks if device.type == "cuda" and near else 0
    engines = shares.engine_actors * shares.nodes
    wanted = {
        "CPUs": {
            "rollout.ray.cpus": (shares.environment_actors * shares.nodes, block.cpus),
            "engine.actor_cpus": (engines, engine.actor_cpus),
        },
        "GPUs": {"learner": (learners, 1.0), "engine.actor_gpus": (engines, engine.actor_gpus)},
    }
    if block.address is None:
        offered = {"CPUs": float(os.cpu_count() or 1), "GPUs": float(torch.cuda.device_count())}
        where = "this machine"
    else:
        from agentrl.scale.cluster import connected, machines

        with connected(block.address):
            found = [machine["Resources"] for machine in machines()]
        offered = {f"{kind}s": sum(each.get(kind, 0.0) for each in found) for kind in ("CPU", "GPU")}
        where = f"the cluster's {len(found)} machines"
    for kind, uses in wanted.items():
        total = sum(count * each for count, each in uses.values())
        if total > offered[kind]:
            sums = "; ".join(
                f"{count} x {each:g}, {key}" for key, (count, each) in uses.items() if count * each
            )
            yield f"{kind}: {total:g} wanted ({sums}), and {offered[kind]:g} found on {where}"


def of_room(
    config: RunConfig, shares: Shares, device: torch.device, wanted: Mapping[str, int]
) -> Iterator[str]:
    """Accelerators, memory and disk of this machine.

    Args:
        config: of the run.
        shares: of this machine.
        device: that the policy computes on.
        wanted: bytes of memory, GPU memory and disk.
    """
    there = torch.cuda.device_count()
    # Ray deals out those of a launcher or an actor.
    if device.type == "cuda" and there and config.learner.launcher == "torchrun":
        if shares.trainers > there:
            yield f"GPUs: {shares.trainers} wanted on this machine, one for each process, and {there} found"
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(there))
        yield from _shortage("GPU memory", wanted["GPU memory"], free, "lower learner.micro_batch_tokens")
    memory = psutil.virtual_memory().available
    yield from _shortage("memory", wanted["memory"], memory, "lower rollout.max_active")
    disk = shutil.disk_usage(_existing(Path(config.run.folder))).free
    yield from _shortage("disk", wanted["disk"], disk, "make room where run.folder is")
    if there:
        yield from _of_cache(config, torch.cuda.mem_get_info(0)[1])


def _shortage(what: str, wanted: int, there: int, remedy: str) -> Iterator[str]:
    if wanted > there:
        yield f"{what}: at most {decimal(wanted)} wanted, {decimal(there)} free; {remedy}"


def _of_cache(config: RunConfig, memory: int) -> Iterator[str]:
    """Whether vLLM's share of a GPU holds its weights and one sequence."""
    block = config.engine.vllm
    if config.engine.name != "vllm" or block.url is not None:
        return
    model = skeleton(config.policy)
    wanted = weight_bytes(model) + cache_bytes(model, 1, context_length(model, config.policy.max_context))
    if wanted > block.tensor_parallel_size * block.gpu_memory_share * memory:
        yield (
            f"engine.vllm.gpu_memory_share is {block.gpu_memory_share:g}, wanted room for "
            f"{decimal(wanted)} of weights and one sequence on {block.tensor_parallel_size} GPUs of "
            f"{decimal(memory)}"
        )


def check_algorithm(algorithm: Algorithm, engine: EngineConfig) -> None:
    """Refuse one that requires what neither learner nor engine provides.

    Raises:
        RequirementError: naming it.
    """
    wanted = algorithm.requires
    own = provided(reference="reference" in wanted, critic="values" in wanted)
    check_requirements(algorithm, own | engine.provides)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_run(config: RunConfig, ranks: int) -> None:
    """Refuse, before anything is started, a run that could not begin.

    Args:
        config: The configuration of the run.
        ranks: The processes that learn together.

    Raises:
        AgentRLError: Something is wrong with the configuration or missing on this machine.
    """
    wanted = config.learner.processes
    if wanted not in (None, ranks):
        raise ConfigError(
            f"learner.processes is {wanted}, but {ranks} were started; learner.launcher=ray starts "
            "them by itself, without torchrun"
        )
    if mistakes := list(rank_mistakes(config, ranks)):
        raise ConfigError("\n".join(mistakes))
    check_engine(config.engine, ranks=ranks)
    check_actors(config.engine, config.rollout.ray.address)
    check_server(config.engine)
    check_algorithm(config.algorithm.build(), config.engine)
    if config.rollout.workers.interpreter is None:
        check_id(config.env.id)
    for learner in (config.warm_start.learner, config.learner):
        if learner.lora is not None:
            check_adapters(skeleton(config.policy), learner.lora)
