"""From a configuration to an engine, wherever it generates."""

from collections.abc import Iterable

from transformers import PreTrainedModel

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
        MissingExtraError: without the packages of the engine.
    """
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
    return TorchEngine(model, stop_ids=stop_ids, max_context=max_context, max_sequences=max_sequences)
