"""From a configuration to an engine, wherever it generates."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl.policy.engine import Engine
from agentrl.policy.settings import EngineConfig
from agentrl.policy.torch_engine import TorchEngine
from agentrl.scale.extras import check_ray


def open_engine(
    model: PreTrainedModel,
    config: EngineConfig,
    *,
    stop_ids: Iterable[int],
    max_context: int,
    max_sequences: int,
    address: str | None = None,
) -> Engine:
    """Have an engine for a model; its owner closes it.

    Args:
        model: whose weights it generates with, see `Engine`.
        config: which engine.
        stop_ids: end a free reply; every choice ends in one of them.
        max_context: tokens that a sequence may hold.
        max_sequences: in flight at once, or waiting between two turns.
        address: of the cluster that `engine.actors` are on; see `RayConfig`.

    Raises:
        ConfigError, MissingDependencyError: see `check_engine`, or the engine does not start.
    """
    check_engine(config)
    if config.actors is not None:
        check_ray(f"engine.actors={config.actors}")
        from agentrl.scale.ray_engines import RayEngines

        return RayEngines(
            model,
            config,
            stop_ids=stop_ids,
            max_context=max_context,
            max_sequences=max_sequences,
            address=address,
        )
    if config.name == "vllm" and config.vllm.url is not None:
        from agentrl.scale.vllm_server import VllmServerEngine

        return VllmServerEngine(
            model,
            config.vllm,
            stop_ids=stop_ids,
            max_context=max_context,
            max_sequences=max_sequences,
        )
    if config.name == "vllm":
        from agentrl.scale.vllm_engine import VllmEngine

        return VllmEngine(
            model,
            config.vllm,
            stop_ids=stop_ids,
            max_context=max_context,
            max_sequences=max_sequences,
        )
    return TorchEngine(model, stop_ids=stop_ids, max_context=max_context, max_sequences=max_sequences)


def check_actors(config: EngineConfig, address: str | None) -> None:
    """Refuse engine actors that the cluster has no room for, before anything is made for them.

    Args:
        config: which engine.
        address: of the cluster; see `RayConfig`.

    Raises:
        MissingDependencyError: without Ray.
        ConfigError: there is no cluster, or it is smaller than what is asked.
    """
    if config.actors is not None:
        check_ray(f"engine.actors={config.actors}")
        from agentrl.scale import cluster

        cluster.check_actors(config, address)


def check_server(config: EngineConfig) -> None:
    """Refuse a server that does not answer, or a folder that is not there, before anything is made for it.

    Raises:
        ConfigError: with the command that starts one.
    """
    folder = config.vllm.weights_folder
    if config.name == "vllm" and folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"engine.vllm.weights_folder: {folder} is no folder on this machine")
    if config.name == "vllm" and config.vllm.url is not None:
        from agentrl.scale.vllm_server import check_answers

        check_answers(config.vllm.url)


def check_engine(config: EngineConfig, *, ranks: int = 1) -> None:
    """Refuse an engine that cannot be had here, before anything is made for it.

    Args:
        config: which engine.
        ranks: processes that share the run, each with an engine of its own.

    Raises:
        MissingDependencyError: without the packages of the engine.
        ConfigError: its settings contradict each other, or ask for more GPUs than there are.
    """
    if config.name != "vllm":
        return
    vllm, gpus = config.vllm, torch.cuda.device_count()
    if vllm.url is not None:
        if config.actors is not None:
            raise ConfigError(
                f"engine.actors is {config.actors} beside engine.vllm.url: the server batches what all ask; "
                "wanted one of the two"
            )
        if vllm.weights_folder is None and not gpus:
            raise ConfigError(
                "engine.vllm.weights_folder is null, which sends weights by NCCL, but this machine has no "
                "GPU; wanted a folder that the server sees as well"
            )
        if vllm.weights_folder is None and ranks > 1:
            raise ConfigError(
                f"engine.vllm.weights_folder is null, which sends weights by NCCL from one process, but "
                f"{ranks} share the run; wanted a folder that the server sees as well"
            )
        if importlib.util.find_spec("httpx2") is None:
            raise MissingDependencyError("engine.vllm.url needs httpx2: pip install httpx2")
        return
    if config.actors is not None:
        if config.actor_gpus and config.actor_gpus < vllm.tensor_parallel_size:
            raise ConfigError(
                f"engine.actor_gpus is {config.actor_gpus}, wanted at least "
                f"engine.vllm.tensor_parallel_size={vllm.tensor_parallel_size}"
            )
    elif vllm.tensor_parallel_size > max(1, gpus):
        raise ConfigError(
            f"engine.vllm.tensor_parallel_size is {vllm.tensor_parallel_size}, but this machine has {gpus} "
            "GPUs"
        )
    elif ranks > 1:
        raise ConfigError(
            f"engine.name=vllm cannot share a process with one of {ranks} ranks; set engine.actors, or "
            "engine.vllm.url of a server"
        )
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "engine.name=vllm needs vLLM, in an environment of its own: "
            "pip install -c constraints-vllm.txt -e '.[vllm]'"
        )
