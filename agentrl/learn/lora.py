"""Adapters of low rank beside frozen weights (LoRA: Hu et al. 2021, arXiv:2106.09685), through peft."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentrl.errors import ConfigError, missing_extra
from agentrl.learn.settings import LoraConfig
from agentrl.learn.sharding import full_tensor
from agentrl.policy.architecture import called_linear_layers

_ADAPTER = "default"  # peft's name for the only one


def check_adapters(policy: nn.Module, config: LoraConfig) -> None:
    """Refuse adapters that could not be added, and those that would never act.

    A linear map can hold an adapter, but it works only where the map is called. The output layer is not: its
    weight is read, which may be that of the input embeddings as well.

    Args:
        policy: of a Hugging Face model its maps are tried out; of another module all are taken to be called.
        config: of the adapters.

    Raises:
        MissingDependencyError: without peft.
        ConfigError: when the policy has no map of one of the names, or does not call one.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("learner.lora needs peft", "lora") from error
    maps, called = _maps(policy), _called(policy)
    wrong = [name for name in config.targets if name not in map(_own_name, called)]
    if not wrong and config.targets:
        return
    idle = [name for name in wrong if name in map(_own_name, maps)]
    why = f"; an adapter of {', '.join(idle)} would never act, for only the weight is read" if idle else ""
    raise ConfigError(
        f"learner.lora.targets is {', '.join(config.targets) or 'empty'}, wanted some of the policy's "
        f"linear maps: {', '.join(sorted(set(map(_own_name, called)))) or 'it has none'}{why}"
    )


def _maps(policy: nn.Module) -> set[str]:
    return {name for name, module in policy.named_modules() if isinstance(module, nn.Linear)}


def _called(policy: nn.Module) -> set[str]:
    """The linear maps through which sequences go, by their whole names."""
    return called_linear_layers(policy) if isinstance(policy, PreTrainedModel) else _maps(policy)


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]


def add_adapters(policy: nn.Module, config: LoraConfig) -> None:
    """Freeze a policy's weights and let each named map learn a matrix of low rank to be added to its own.

        W + (alpha / rank) B A,   B of [out, rank] is 0 to begin with, A of [rank, in] is random

    A is the same in every run: the global generators are left as they were.

    Raises:
        MissingDependencyError, ConfigError: as `check_adapters`.
    """
    check_adapters(policy, config)
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),
        target_modules=sorted(name for name in _called(policy) if _own_name(name) in config.targets),
        lora_dropout=0.0,
    )
    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(settings, policy)


def plain_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight, whole and under the name that it has without adapters, these added in; one at a time."""
    adapted = {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    for name, parameter in policy.named_parameters():
        owner, _, own = name.partition(".base_layer.")
        if owner in adapted:
            added = _product(adapted[owner]) if own == "weight" else 0.0
            yield f"{owner}.{own}", full_tensor(parameter) + added
        elif ".lora_" not in name:
            yield name, full_tensor(parameter)


def _product(module: Any) -> Tensor:
    down, up = (full_tensor(part[_ADAPTER].weight) for part in (module.lora_A, module.lora_B))
    return cast(Tensor, module.scaling[_ADAPTER] * (up @ down))
