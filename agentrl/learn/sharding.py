"""Weights dealt out to ranks by FSDP2: each holds a part, and has a layer whole while it is computed."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from agentrl.errors import CheckpointError
from agentrl.learn.ranks import ensure_group
from agentrl.learn.settings import LearnerConfig

T = TypeVar("T")


class ScoringModule(nn.Module):
    """A policy and its value head as one module, for weights are whole only inside a module's `forward`."""

    def __init__(self, policy: nn.Module, value_head: nn.Module | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head

    def forward(self, read: Callable[[nn.Module, nn.Module | None], T]) -> T:
        """Whatever `read` makes of the two; tensors in it that need a gradient must lie in a tuple."""
        return read(self.policy, self.value_head)


def shard(module: ScoringModule, config: LearnerConfig) -> None:
    """Deal out the weights, layer by layer, in place; all ranks take those of the first one.

    Gradients are summed over ranks, not averaged: each rank's loss is its own part of the whole one.
    """
    device = next(module.parameters()).device
    ensure_group(device)
    for values in (*module.parameters(), *module.buffers()):
        dist.broadcast(values.detach(), 0)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": _precision(config),
    }
    for layer in layers(module.policy):
        fully_shard(layer, **settings)
    fully_shard(module, **settings)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _precision(config: LearnerConfig) -> MixedPrecisionPolicy:
    if config.compute_dtype != "bfloat16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)


def layers(policy: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a Hugging Face model names as those not to be split; none of another module."""
    names = getattr(policy, "_no_split_modules", None) or ()
    return (module for module in policy.modules() if type(module).__name__ in names)


def recompute_activations(policy: nn.Module) -> None:
    """Keep only what goes into each layer, and compute the layer again on the way back."""
    for layer in layers(policy):
        cast(Any, layer).forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def write_shards(folder: Path, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Write what this rank holds of some modules, and of the optimisers of the first; every rank must.

    Raises:
        CheckpointError: when a rank cannot write.
    """
    try:
        save(_tensors(modules, optimizers), checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: a rank could not write its part ({error})") from error


def read_shards(folder: Path, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Read what any number of ranks wrote of the same modules and optimisers.

    Raises:
        CheckpointError: when it does not fit.
    """
    state = _tensors(modules, optimizers)
    try:
        load(state, checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: does not fit this policy ({error})") from error
    if optimizers:
        set_optimizer_state_dict(_first(modules), list(optimizers), state["optimizers"])


def stored_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors that ranks wrote, whole and one at a time; any process may, alone."""
    reader = FileSystemReader(folder)
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
            with warnings.catch_warnings(action="ignore"):  # of reading alone, which is meant
                load({name: tensor}, storage_reader=reader, no_dist=True)
            yield name, tensor


def _tensors(modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    state: dict[str, Any] = {
        name: {key: parameter.detach() for key, parameter in module.named_parameters()}
        for name, module in modules.items()
    }
    if optimizers:  # one that has not stepped yet is given the empty memory of one that has
        state["optimizers"] = get_optimizer_state_dict(_first(modules), list(optimizers))
    return state


def _first(modules: Mapping[str, nn.Module]) -> nn.Module:
    return next(iter(modules.values()))


def reshard(module: nn.Module) -> None:
    """Drop the whole weights that a pass without gradients leaves behind."""
    if isinstance(module, FSDPModule):
        module.reshard()


def full_tensor(values: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def own_part(values: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return values.to_local() if isinstance(values, DTensor) else values


def orthogonalise_whole(optimizer: Optimizer) -> None:
    """Give an optimiser of matrices whole gradients: the ranks then do the same work and send nothing.

    What it remembers of them is whole as well; the weights stay dealt out.
    """
    optimizer.register_step_pre_hook(_with_whole_gradients)


def _with_whole_gradients(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=[Replicate()])
