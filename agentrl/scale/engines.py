"""From a configuration to an engine, wherever it generates."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from agentrl.errors import ConfigError
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
        )
    return open_local_engine(
        model, config, stop_ids=stop_ids, max_context=max_context, max_sequences=max_sequences
    )


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
