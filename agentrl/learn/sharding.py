"""Weights sharded over ranks by FSDP2: a rank holds a part, and gathers a layer while it is computed."""

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
from agentrl.learn.ranks import ensure_process_group
from agentrl.learn.settings import LearnerConfig

T = TypeVar("T")


class ScoringModule(nn.Module):
    """Module of a policy and its value head, since weights are gathered only inside a module's `forward`."""

    def __init__(self, policy: nn.Module, value_head: nn.Module | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head

    def forward(self, read: Callable[[nn.Module, nn.Module | None], T]) -> T:
        """Return the result of `read`; tensors in it that need a gradient must be in a tuple."""
        return read(self.policy, self.value_head)


def shard(module: ScoringModule, config: LearnerConfig) -> None:
    """Shard the weights in place, layer by layer; all ranks start with the weights of rank 0.

    Gradients are summed over ranks, not averaged, since each rank computes its own part of the loss.
    """
    device = next(module.parameters()).device
    ensure_process_group(device)
    # Ranks may have drawn different random weights; a shard must belong to one model.
    for values in (*module.parameters(), *module.buffers()):
        dist.broadcast(values.detach(), 0)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": _precision(config),
    }
    # Each layer is a unit of its own, so that only one is gathered at a time; the root takes the rest.
    for layer in layers(module.policy):
        fully_shard(layer, **settings)
    fully_shard(module, **settings)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # FSDP2 averages by default, which would scale the loss by 1 / ranks.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _precision(config: LearnerConfig) -> MixedPrecisionPolicy:
    if config.compute_dtype != "bfloat16":
        return MixedPrecisionPolicy()
    # Summed in bfloat16, small gradients of other ranks would be rounded away.
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)


def layers(policy: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks that a Hugging Face model names as not to be split; none for other modules."""
    names = getattr(policy, "_no_split_modules", None) or ()
    return (module for module in policy.modules() if type(module).__name__ in names)


def recompute_activations(policy: nn.Module) -> None:
    """Keep only the input of each layer, and recompute the layer in the backward pass."""
    for layer in layers(policy):
        # No dropout is active, so there is no generator state to restore.
        cast(Any, layer).forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def write_shards(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer],
    *,
    trained: bool = False,
) -> None:
    """Write this rank's part of some modules, and of the first one's optimisers; every rank must call it.

    Args:
        folder: The folder to write.
        modules: The modules by name.
        optimizers: Optimisers of the first module.
        trained: Whether to leave out the weights that do not require gradients.

    Raises:
        CheckpointError: If a rank cannot write.
    """
    try:
        save(_tensors(modules, optimizers, trained=trained), checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: a rank could not write its part ({error})") from error


def read_shards(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer],
    *,
    trained: bool = False,
) -> None:
    """Load into modules and optimisers what any number of ranks wrote of the same ones, see `write_shards`.

    Raises:
        CheckpointError: If it does not fit.
    """
    state = _tensors(modules, optimizers, trained=trained)
    try:
        load(state, checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: does not fit this policy ({error})") from error
    if optimizers:
        set_optimizer_state_dict(_first(modules), list(optimizers), state["optimizers"])


def stored_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors that ranks wrote, one at a time; a single process can call it."""
    reader = FileSystemReader(folder)
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
            with warnings.catch_warnings(action="ignore"):  # about loading without a process group
                load({name: tensor}, storage_reader=reader, no_dist=True)
            yield name, tensor


def _tensors(
    modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], *, trained: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {
        name: {
            key: parameter.detach()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad or not trained
        }
        for name, module in modules.items()
    }
    if optimizers:  # this also creates the state of one that has not stepped yet, to load into
        state["optimizers"] = get_optimizer_state_dict(_first(modules), list(optimizers))
    return state


def _first(modules: Mapping[str, nn.Module]) -> nn.Module:
    return next(iter(modules.values()))


def reshard(module: nn.Module) -> None:
    """Free the gathered weights that a pass without gradients leaves behind."""
    # FSDP2 reshards the root after the backward pass only, and such a pass has none.
    if isinstance(module, FSDPModule):
        module.reshard()


def full_tensor(values: Tensor) -> Tensor:
    """Return the full tensor on every rank; every rank must call it."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def local_tensor(values: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return values.to_local() if isinstance(values, DTensor) else values


def replicate_gradients(optimizer: Optimizer) -> None:
    """Give an optimiser of matrices full gradients: every rank orthogonalises them without communication.

    Its momentum is replicated as well; the weights stay sharded.
    """
    optimizer.register_step_pre_hook(_replicate)


def _replicate(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=[Replicate()])
