"""Engines that generate in this process or on a vLLM server, without Ray."""

import importlib.util
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Engine
from agentrl.policy.settings import EngineConfig
from agentrl.policy.torch_engine import TorchEngine
from agentrl.scale.vllm_lora import check_rank


def open_local_engine(
    model: PreTrainedModel,
    config: EngineConfig,
    *,
    stop_ids: Iterable[int],
    max_context: int,
    max_sequences: int,
    adapters: LoraConfig | None = None,
) -> Engine:
    """Create the engine that `config` names, without actors; the caller closes it.

    Args:
        model: The model whose weights it generates with, see `Engine`.
        config: The engine to create; `actors` is ignored.
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        max_context: The largest number of tokens in a sequence.
        max_sequences: The largest number of sequences that are in flight or wait between two turns.
        adapters: The largest adapters that `refresh` gets, if the engine takes any as such.

    Raises:
        ConfigError, MissingDependencyError: See `check_local_engine`; also if the engine does not start.
    """
    check_local_engine(config)
    check_rank(config, adapters)
    adapters = adapters if config.takes_adapters else None
    if config.name != "vllm":
        return TorchEngine(model, stop_ids=stop_ids, max_context=max_context, max_sequences=max_sequences)
    # Imported here, since only these need the extra `vllm`.
    if config.vllm.url is not None:
        from agentrl.scale.vllm_server import VllmServerEngine

        return VllmServerEngine(
            model,
            config.vllm,
            stop_ids=stop_ids,
            max_context=max_context,
            max_sequences=max_sequences,
            adapters=adapters,
        )
    from agentrl.scale.vllm_engine import VllmEngine

    return VllmEngine(
        model,
        config.vllm,
        stop_ids=stop_ids,
        max_context=max_context,
        max_sequences=max_sequences,
        adapters=adapters,
    )


def check_local_engine(config: EngineConfig, *, ranks: int = 1) -> None:
    """Refuse an engine that cannot run in this process or on its server, before anything is made for it.

    Args:
        config: The engine to check; `actors` is ignored.
        ranks: The number of processes that share the run, each with an engine of its own.

    Raises:
        MissingDependencyError: If the packages of the engine are absent.
        ConfigError: If its settings contradict each other, or ask for more GPUs than there are.
    """
    if config.name != "vllm":
        return
    vllm, gpus = config.vllm, torch.cuda.device_count()
    if vllm.url is not None:
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
    if vllm.tensor_parallel_size > max(1, gpus):
        raise ConfigError(
            f"engine.vllm.tensor_parallel_size is {vllm.tensor_parallel_size}, but this machine has {gpus} "
            "GPUs"
        )
    if ranks > 1:
        raise ConfigError(
            f"engine.name=vllm cannot share a process with one of {ranks} ranks; set engine.actors, or "
            "engine.vllm.url of a server"
        )
    check_vllm()


def check_vllm() -> None:
    """Refuse to go on where vLLM is not installed.

    Raises:
        MissingDependencyError: With the command that installs it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "engine.name=vllm needs vLLM, in an environment of its own: "
            "pip install -c constraints-vllm.txt -e '.[vllm]'"
        )
