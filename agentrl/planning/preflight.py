"""Checks made before a run starts: `plan` lists the problems, `check_run` raises them.

`problems` makes the checks that both share. Free memory, free disk space and the port of torchrun are checked
for `plan` only: once training starts, torchrun itself uses the port.
"""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal

from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.algorithms.importance import with_importance_correction
from agentrl.algorithms.token_statistics import reads_teacher
from agentrl.env.registry import check_id
from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.learner import provided
from agentrl.learn.lora import check_adapters
from agentrl.planning.memory import cache_bytes, weight_bytes
from agentrl.planning.topology import Topology
from agentrl.policy.model import context_length, resolve_device, skeleton
from agentrl.policy.prompt import load_prompt
from agentrl.policy.settings import EngineConfig, PolicyConfig
from agentrl.run.own_data import read_own_data
from agentrl.run.policies import check_fitted
from agentrl.run.settings import RunConfig, rank_mistakes
from agentrl.run.teachers import check_teacher
from agentrl.scale.engines import check_actors, check_engine, check_server, check_weights_folder
from agentrl.scale.extras import check_ray, ray_is_initialized
from agentrl.scale.vllm_lora import check_rank

_RENDEZVOUS = 29500  # torchrun's default port


@dataclass(frozen=True)
class Problem:
    """Reason why a run cannot start.

    Args:
        text: The message, which names the setting, the value and what was wanted.
        error: The error that the problem came from, or one made of the text.
    """

    text: str
    error: Exception


@contextmanager
def collect_error(found: list[Problem]) -> Iterator[None]:
    """Append an expected error that ends a `with` block to `found`, unless its text is there already."""
    try:
        yield
    except (AgentRLError, OSError) as error:
        _append(found, Problem(str(error), error))


def collect(found: list[Problem], texts: Iterator[str]) -> None:
    """Append a problem for each text, and one for an expected error that ends the iteration."""
    with collect_error(found):
        for text in texts:
            _append(found, Problem(text, ConfigError(text)))


def _append(found: list[Problem], problem: Problem) -> None:
    if all(problem.text != other.text for other in found):
        found.append(problem)


def problems(config: RunConfig, topology: Topology, *, new_folder: bool = True) -> list[Problem]:
    """Return all problems that can be found without starting an environment or loading weights.

    A cluster or server that the configuration names is contacted; Ray is not started.

    Args:
        config: The configuration of the run.
        topology: The distribution of its processes over machines.
        new_folder: Whether the run is going to create its folder.
    """
    found: list[Problem] = []
    collect(found, _rank_problems(config, topology))
    if new_folder:
        collect(found, _folder_problems(config))
    with collect_error(found):
        check_engine(config.engine, ranks=topology.ranks)
        check_server(config.engine)  # needs the packages that `check_engine` looks for
    with collect_error(found):
        check_rank(config.engine, config.largest_adapters)
    with collect_error(found):
        check_weights_folder(config.engine)
    with collect_error(found):
        check_env_id(config)
    with collect_error(found):
        check_device(config)
    collect(found, _cluster_problems(config, topology))
    with collect_error(found):
        algorithm = config.algorithm.build()
        check_algorithm(
            algorithm,
            config.engine,
            scores=topology.ranks == 1 and config.trainer.mode == "sync",
            teacher=config.learner.teacher is not None,
            adapted=config.learner.lora is not None,
        )
        check_ahead(algorithm, config.trainer.mode)
        block = config.trainer
        with_importance_correction(algorithm, block.importance_cap, default=block.correction)
    if config.learner.teacher is not None:
        with collect_error(found):
            check_taught(config)
            check_teacher(config)
    with collect_error(found):
        check_prompt(config.policy)
    if new_folder:  # a run that goes on reads it if it still clones
        with collect_error(found):
            read_own_data(config)
    with collect_error(found):
        model = skeleton(config.policy)
        context_length(model, config.policy.max_context)
    for learner in (config.warm_start.learner, config.learner):
        if learner.lora is not None:
            with collect_error(found):
                check_adapters(skeleton(config.policy), learner.lora)
    return found


def check_run(config: RunConfig, ranks: int, *, new_folder: bool = True) -> None:
    """Raise an error for what `problems` finds.

    Args:
        config: The configuration of the run.
        ranks: The number of processes that learn together.
        new_folder: Whether this process is going to create the folder of the run.

    Raises:
        AgentRLError: There is a problem. A single one raises its own error, several raise a `ConfigError`
            with a line for each.
    """
    found = problems(config, Topology(config, ranks, nodes=1), new_folder=new_folder)
    if len(found) == 1:
        raise found[0].error
    if found:
        raise ConfigError("\n".join(problem.text for problem in found))


def check_prompt(block: PolicyConfig) -> None:
    """Refuse a prompt that cannot be read, or that a policy without a chat template cannot follow.

    Raises:
        ConfigError: Naming the key.
    """
    load_prompt(block.prompt, block.history)
    if block.path is None:
        check_fitted(block)


def check_algorithm(
    algorithm: Algorithm,
    engine: EngineConfig,
    *,
    scores: bool = True,
    teacher: bool = False,
    adapted: bool = False,
) -> None:
    """Refuse an algorithm that requires what neither the learner nor the engine provides.

    Args:
        algorithm: The algorithm.
        engine: The configuration of the engine.
        scores: Whether the learner can score replies during the rollout.
        teacher: Whether the learner has a teacher.
        adapted: Whether the learner trains adapters.

    Raises:
        RequirementError: Naming what is missing.
    """
    wanted = algorithm.requires
    own = provided(
        reference="reference" in wanted,
        critic="values" in wanted,
        teacher=teacher,
        reward_model=algorithm.reward_model is not None and not adapted,
        views=algorithm.view is not None,
    )
    check_requirements(algorithm, own | engine.provides | ({"rollout:scores"} if scores else set()))


def check_taught(config: RunConfig) -> None:
    """Refuse a teacher that the method does not read.

    Raises:
        ConfigError: Naming both.
    """
    if not reads_teacher(config.algorithm.build().requires):
        raise ConfigError(
            f"learner.teacher is {config.learner.teacher!r}, but algorithm.name={config.algorithm.name} "
            "reads no teacher; wanted null, or a method that does, such as distill"
        )


def check_ahead(algorithm: Algorithm, mode: str) -> None:
    """Refuse, in async mode, a stateful component in the slots that are called while steps are played ahead.

    The learner would change its state meanwhile, on every rank at another time.

    Raises:
        ConfigError: Naming the component.
    """
    names = algorithm.find_stateful("select", "rollout") if mode == "async" else {}
    if names:
        raise ConfigError(
            f"trainer.mode is async, and the algorithm's rollout reads the state of {', '.join(names)}, "
            "which would change while a step is played ahead; wanted trainer.mode=sync"
        )


def check_env_id(config: RunConfig) -> None:
    """Refuse an environment that is not registered here, unless another interpreter runs it.

    Raises:
        ConfigError: Suggesting similar ids.
    """
    if config.rollout.workers.interpreter is None:
        for env in config.environments:
            check_id(env.id)


def check_device(config: RunConfig) -> None:
    """Refuse a device that this machine lacks, unless the policy is computed on a cluster.

    Raises:
        ConfigError: Naming the devices that there are.
    """
    if not _learns_on_cluster(config):
        resolve_device(config.policy.device)


def compute_device(config: RunConfig) -> torch.device:
    """Return the device that the policy computes on, whether this machine has it or not."""
    name = config.policy.device
    return resolve_device(name) if name == "auto" else torch.device(name)


def _learns_on_cluster(config: RunConfig) -> bool:
    return config.learner.launcher == "ray" and config.rollout.ray.address is not None


def _rank_problems(config: RunConfig, topology: Topology) -> Iterator[str]:
    """Find settings that contradict the number of ranks or machines."""
    ranks, wanted = topology.ranks, config.learner.processes
    if wanted not in (None, ranks):
        yield (
            f"learner.processes is {wanted}, but {ranks} were started; learner.launcher=ray starts "
            "them by itself, without torchrun"
        )
    yield from rank_mistakes(config, ranks)
    if config.learner.launcher == "ray" and topology.nodes > 1 and config.rollout.ray.address is None:
        yield (
            "rollout.ray.address is null, which starts Ray on this machine alone, wanted that of a "
            f"cluster of {topology.nodes}"
        )


def _folder_problems(config: RunConfig) -> Iterator[str]:
    """Find out whether the folder of the run can be created."""
    block = config.run
    folder = Path(block.folder)
    if block.name is not None and os.path.lexists(folder / block.name):
        yield (
            f"run.name is {block.name!r}, but {folder / block.name} exists; "
            f"resume it (agentrl train --resume {folder / block.name}) or choose another"
        )
    existing = _existing_parent(folder)
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        yield (
            f"run.folder is {block.folder!r}, which cannot hold runs: {existing} is not a folder that can be "
            "written to"
        )


def _cluster_problems(config: RunConfig, topology: Topology) -> Iterator[str]:
    """Find out whether the cluster has the CPUs and GPUs of all actors, those of the panel included."""
    engine, block = config.engine, config.rollout.ray
    asked = {
        "rollout.backend=ray": config.rollout.backend == "ray",
        f"engine.actors={engine.actors}": engine.actors is not None,
        "learner.launcher=ray": config.learner.launcher == "ray",
    }
    if not topology.ray:
        return
    check_ray(", ".join(key for key, given in asked.items() if given))
    wanted = _wanted_resources(config, topology)
    ray_answers = block.address is not None or ray_is_initialized()
    if ray_answers:
        from agentrl.scale.cluster import connected, machines

        with connected(block.address):
            found = [machine["Resources"] for machine in machines()]
        offered = {f"{kind}s": sum(each.get(kind, 0.0) for each in found) for kind in ("CPU", "GPU")}
        where = f"the cluster's {len(found)} machines"
    else:
        offered = {"CPUs": float(os.cpu_count() or 1), "GPUs": float(torch.cuda.device_count())}
        where = "this machine"
    fits = True
    for kind, uses in wanted.items():
        total = sum(count * each for count, each in uses.values())
        if total > offered[kind]:
            fits = False
            sums = "; ".join(
                f"{count} x {each:g}, {key}" for key, (count, each) in uses.items() if count * each
            )
            yield f"{kind}: {total:g} wanted ({sums}), and {offered[kind]:g} found on {where}"
    if fits and ray_answers:
        check_actors(engine, block.address)  # an actor must fit on a single machine as well


def _wanted_resources(config: RunConfig, topology: Topology) -> dict[str, dict[str, tuple[int, float]]]:
    """Return what is asked of the cluster: by kind and setting, a count and the amount for each."""
    engine, block = config.engine, config.rollout.ray
    environments = topology.environment_actors * topology.nodes
    engines = topology.engine_actors * topology.nodes
    # Actors use the GPUs of the ranks if Ray started these, or if Ray is on this machine alone.
    shared = config.learner.launcher == "ray" or block.address is None
    learners = topology.ranks if shared and compute_device(config).type == "cuda" else 0
    return {
        "CPUs": {
            "rollout.ray.cpus": (environments, block.cpus),
            "engine.actor_cpus": (engines, engine.actor_cpus),
        },
        "GPUs": {"learner": (learners, 1.0), "engine.actor_gpus": (engines, engine.actor_gpus)},
    }


def port_problems(config: RunConfig, topology: Topology) -> Iterator[str]:
    """Find out whether the port at which the ranks of torchrun meet is free."""
    if topology.ranks == 1 or config.learner.launcher == "ray":
        return
    port = int(os.environ.get("MASTER_PORT", _RENDEZVOUS))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield f"torchrun --master-port: {port} is not available ({error.strerror}); choose another"


def capacity_problems(
    config: RunConfig, topology: Topology, device: torch.device, wanted: Mapping[str, int]
) -> Iterator[str]:
    """Compare what a run needs with the GPUs, the free memory and the free disk space of this machine.

    Args:
        config: The configuration of the run.
        topology: The distribution of its processes over machines.
        device: The device that the policy computes on.
        wanted: The bytes of "memory", "GPU memory" and "disk".
    """
    gpus = torch.cuda.device_count()
    # Ray assigns the GPUs of the ranks and actors that it starts.
    if device.type == "cuda" and gpus and config.learner.launcher == "torchrun":
        if topology.trainers > gpus:
            yield f"GPUs: {topology.trainers} wanted on this machine, one for each process, and {gpus} found"
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(gpus))
        yield from _shortage("GPU memory", wanted["GPU memory"], free, "lower learner.micro_batch_tokens")
    memory = psutil.virtual_memory().available
    yield from _shortage("memory", wanted["memory"], memory, "lower rollout.max_active")
    disk = shutil.disk_usage(_existing_parent(Path(config.run.folder))).free
    yield from _shortage("disk", wanted["disk"], disk, "make room where run.folder is")
    if gpus:
        yield from _vllm_shortage(config, torch.cuda.mem_get_info(0)[1])


def _shortage(what: str, wanted: int, free: int, remedy: str) -> Iterator[str]:
    if wanted > free:
        yield f"{what}: at most {decimal(wanted)} wanted, {decimal(free)} free; {remedy}"


def _vllm_shortage(config: RunConfig, memory: int) -> Iterator[str]:
    """Find out whether vLLM's part of a GPU's `memory`, in bytes, holds the weights and one sequence."""
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


def _existing_parent(folder: Path) -> Path:
    """Return the folder itself, or the nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
