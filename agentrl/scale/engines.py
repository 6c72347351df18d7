"""Creation and checks of the engine that a configuration names, in this process or on a cluster."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from agentrl.errors import ConfigError
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Engine
from agentrl.policy.settings import EngineConfig
from agentrl.scale.extras import check_ray
from agentrl.scale.local_engine import check_local_engine, check_vllm, open_local_engine


def open_engine(
    model: PreTrainedModel,
    config: EngineConfig,
    *,
    stop_ids: Iterable[int],
    max_context: int,
    max_sequences: int,
    address: str | None = None,
    adapters: LoraConfig | None = None,
) -> Engine:
    """Create an engine for a model; the caller closes it.

    Args:
        model: The model whose weights it generates with, see `Engine`.
        config: The engine to create.
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        max_context: The largest number of tokens in a sequence.
        max_sequences: The largest number of sequences that are in flight or wait between two turns.
        address: The address of the cluster that runs `engine.actors`; see `RayConfig`.
        adapters: The largest adapters that `refresh` gets, if the engine takes any as such.

    Raises:
        ConfigError, MissingDependencyError: See `check_engine`; also if the engine does not start.
    """
    if config.actors is not None:
        check_engine(config)
        check_ray(f"engine.actors={config.actors}")
        from agentrl.scale.ray_engines import RayEngines

        return RayEngines(
            model,
            config,
            stop_ids=stop_ids,
            max_context=max_context,
            max_sequences=max_sequences,
            address=address,
            adapters=adapters,
        )
    return open_local_engine(
        model,
        config,
        stop_ids=stop_ids,
        max_context=max_context,
        max_sequences=max_sequences,
        adapters=adapters,
    )


def check_actors(config: EngineConfig, address: str | None) -> None:
    """Refuse engine actors that do not fit on the cluster, before anything is made for them.

    Args:
        config: The engine to check.
        address: The address of the cluster; see `RayConfig`.

    Raises:
        MissingDependencyError: If Ray is not installed.
        ConfigError: If there is no cluster, or it has too few CPUs or GPUs.
    """
    if config.actors is not None:
        check_ray(f"engine.actors={config.actors}")
        from agentrl.scale import cluster

        cluster.check_actors(config, address)


def check_weights_folder(config: EngineConfig) -> None:
    """Refuse a folder for the weights of a vLLM server that is not on this machine.

    Raises:
        ConfigError: Naming the folder.
    """
    folder = config.vllm.weights_folder
    if config.name == "vllm" and folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"engine.vllm.weights_folder: {folder} is no folder on this machine")


def check_server(config: EngineConfig) -> None:
    """Refuse a vLLM server that does not answer, before anything is made for it.

    Raises:
        ConfigError: With the command that starts a server.
    """
    if config.name == "vllm" and config.vllm.url is not None:
        from agentrl.scale.vllm_server import check_answers

        check_answers(config.vllm.url)


def check_engine(config: EngineConfig, *, ranks: int = 1) -> None:
    """Refuse an engine that cannot run here, before anything is made for it.

    Args:
        config: The engine to check.
        ranks: The number of processes that share the run, each with an engine of its own.

    Raises:
        MissingDependencyError: If the packages of the engine are absent.
        ConfigError: If its settings contradict each other, or ask for more GPUs than there are.
    """
    if config.actors is None:
        check_local_engine(config, ranks=ranks)
    elif config.name == "vllm":
        vllm = config.vllm
        if vllm.url is not None:
            raise ConfigError(
                f"engine.actors is {config.actors} beside engine.vllm.url, but the server batches all "
                "requests itself; wanted one of the two"
            )
        if config.actor_gpus and config.actor_gpus < vllm.tensor_parallel_size:
            raise ConfigError(
                f"engine.actor_gpus is {config.actor_gpus}, wanted at least "
                f"engine.vllm.tensor_parallel_size={vllm.tensor_parallel_size}"
            )
        check_vllm()
