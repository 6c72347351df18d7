"""Low-rank adapters over frozen weights (LoRA: Hu et al. 2021, arXiv:2106.09685), through peft."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from agentrl.errors import CheckpointError, ConfigError, missing_extra
from agentrl.learn.settings import LoraConfig
from agentrl.learn.sharding import full_tensor
from agentrl.policy.architecture import called_linear_layers
from agentrl.policy.engine import Adapter

_ADAPTER = "default"  # peft's name for a model's only adapter
_PREFIX = "base_model.model."  # of the names in peft's files


def check_adapters(policy: nn.Module, config: LoraConfig) -> None:
    """Raise an error for adapters that cannot be added or would have no effect.

    An adapter works only in a linear layer that is called. The output layer is not called: only its weight is
    read, which may be shared with the input embeddings.

    Args:
        policy: The model. A Hugging Face model is run to find the layers that it calls; in any other module
            all linear layers are assumed to be called.
        config: The configuration of the adapters.

    Raises:
        MissingDependencyError: If peft is not installed.
        ConfigError: If the policy has no linear layer of a given name, or does not call it.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("learner.lora needs peft", "lora") from error
    maps, called = _linear_layers(policy), _called_layers(policy)
    wrong = [name for name in config.targets if name not in map(_short_name, called)]
    if not wrong and config.targets:
        return
    idle = [name for name in wrong if name in map(_short_name, maps)]
    why = (
        f"; an adapter of {', '.join(idle)} would have no effect, since only its weight is read"
        if idle
        else ""
    )
    raise ConfigError(
        f"learner.lora.targets is {', '.join(config.targets) or 'empty'}, wanted some of the policy's "
        f"linear layers: {', '.join(sorted(set(map(_short_name, called)))) or 'it has none'}{why}"
    )


def _linear_layers(policy: nn.Module) -> set[str]:
    return {name for name, module in policy.named_modules() if isinstance(module, nn.Linear)}


def _called_layers(policy: nn.Module) -> set[str]:
    """Return the full names of the linear layers that a forward pass calls."""
    return called_linear_layers(policy) if isinstance(policy, PreTrainedModel) else _linear_layers(policy)


def _short_name(name: str) -> str:
    return name.rpartition(".")[2]


def add_adapters(policy: nn.Module, config: LoraConfig) -> None:
    """Freeze a policy's weights and add a trainable low-rank matrix to each named linear layer.

        W + (alpha / rank) B A,   B of [out, rank] is 0 at first, A of [rank, in] is random

    A is the same in every run, and the state of the global generators is left unchanged.

    Raises:
        MissingDependencyError, ConfigError: As in `check_adapters`.
    """
    check_adapters(policy, config)
    import peft

    from agentrl.learn.lora_layer import LoraLinear

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),
        target_modules=sorted(name for name in _called_layers(policy) if _short_name(name) in config.targets),
        lora_dropout=0.0,
    )
    settings._register_custom_module({nn.Linear: LoraLinear})
    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(settings, policy)


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in full, with its adapter merged, under its name without adapters; one at a time."""
    adapted = _adapted_layers(policy)
    for name, parameter in policy.named_parameters():
        owner, _, own = name.partition(".base_layer.")
        if owner in adapted:
            added = _adapter_weight(adapted[owner]) if own == "weight" else 0.0
            yield f"{owner}.{own}", full_tensor(parameter) + added
        elif ".lora_" not in name:
            yield name, full_tensor(parameter)


def base_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every frozen weight in full, under its name without adapters; every rank must call it."""
    for name, parameter in policy.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), full_tensor(parameter.detach())


def adapter_weights(policy: nn.Module) -> dict[str, Tensor]:
    """Return the adapters in full, under their names in peft's files; every rank must call it."""
    return {
        _file_name(name): full_tensor(parameter.detach()).cpu()
        for name, parameter in policy.named_parameters()
        if ".lora_" in name
    }


def blank_adapter(policy: PreTrainedModel, config: LoraConfig) -> Adapter:
    """Return adapters that are 0, of the shapes that `add_adapters` would add to a policy without any."""
    weights = {}
    for name in sorted(_called_layers(policy)):
        if _short_name(name) in config.targets:
            layer = cast(nn.Linear, policy.get_submodule(name))
            weights[f"{_PREFIX}{name}.lora_A.weight"] = torch.zeros(config.rank, layer.in_features)
            weights[f"{_PREFIX}{name}.lora_B.weight"] = torch.zeros(layer.out_features, config.rank)
    return Adapter(weights, config.rank, config.alpha)


def load_adapter_weights(policy: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace a policy's adapters by what `adapter_weights` returned.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    own = {_file_name(name): each for name, each in policy.named_parameters() if ".lora_" in name}
    wrong = [name for name in own if name not in weights or own[name].shape != weights[name].shape]
    if wrong := sorted({*wrong, *(weights.keys() - own.keys())}):
        raise CheckpointError(
            f"{len(wrong)} of the adapters' weights are missing or do not fit this policy, first {wrong[0]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            values = weights[name].to(parameter)
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.copy_(values)


def merge_adapters(policy: nn.Module, weights: Mapping[str, Tensor], scaling: float) -> None:
    """Add adapters, as `adapter_weights` returned them, to the weights of a policy without any, in place.

        W + scaling B A,   scaling = alpha / rank

    Raises:
        CheckpointError: If the policy has no such layer, or an adapter has only one part.
    """
    own = dict(policy.named_parameters())
    for name, down in weights.items():
        layer, found, _ = name.removeprefix(_PREFIX).partition(".lora_A.")
        if not found:
            continue
        up, weight = weights.get(name.replace(".lora_A.", ".lora_B.")), own.get(f"{layer}.weight")
        if up is None or weight is None or weight.shape != (len(up), down.shape[1]):
            raise CheckpointError(f"the adapter of {layer} does not fit this policy")
        with torch.no_grad():
            weight.add_(scaling * (up.to(weight) @ down.to(weight)))


def adapter_settings(policy: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Return what peft needs to add the same adapters to the same model: arguments of its `LoraConfig`."""
    adapted = set(_adapted_layers(policy))
    short = {_short_name(name) for name in adapted}
    idle = {name for name in _linear_layers(policy) if ".base_layer" not in name and ".lora_" not in name}
    exact = not short.isdisjoint(map(_short_name, idle))  # a short name would also mean a layer without one
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapted if exact else short),
        "task_type": "CAUSAL_LM",
    }


def _adapted_layers(policy: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}


def _file_name(name: str) -> str:
    return f"{_PREFIX}{name.replace(f'.{_ADAPTER}.', '.')}"


def _adapter_weight(module: Any) -> Tensor:
    down, up = (full_tensor(part[_ADAPTER].weight) for part in (module.lora_A, module.lora_B))
    return cast(Tensor, module.scaling[_ADAPTER] * (up @ down))
