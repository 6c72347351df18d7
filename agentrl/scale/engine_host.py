"""The actor of `ray_engines`: an engine that receives requests and returns generations in batches."""

import io
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter, Generation
from agentrl.policy.settings import EngineConfig
from agentrl.scale.local_engine import open_local_engine
from agentrl.scale.messages import Generations, Requests, pack_generations, replies_to_await, unpack_requests

Weights = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an actor needs to create its engine, except the weights.

    Args:
        model: The pickled model without the contents of its parameters and buffers.
        config: The engine to create.
        stop_ids: The ids that end a free reply; see `open_local_engine`.
        max_context: The largest number of tokens in a sequence.
        max_sequences: The largest number of sequences on this actor.
        path: The driver's `sys.path`.
        adapters: The largest adapters that the engine gets as such.
    """

    model: bytes
    config: EngineConfig
    stop_ids: tuple[int, ...]
    max_context: int
    max_sequences: int
    path: Sequence[str]
    adapters: LoraConfig | None = None


class EngineHost:
    """Actor class: an engine with its own copy of the model.

    Args:
        spec: The engine to create.
        weights: The weights of the model.
        version: The version of the weights.
        adapter: The adapter to add to the weights in the engine.
    """

    def __init__(
        self, spec: EngineSpec, weights: Weights, version: int, adapter: Adapter | None = None
    ) -> None:
        sys.path.extend(folder for folder in spec.path if folder not in sys.path)
        on_gpu = spec.config.actor_gpus > 0 and spec.config.name == "torch"
        device = torch.device("cuda" if on_gpu else "cpu")  # vLLM places its own copy
        self._tensors, self._model = restore_model(spec.model, weights, device)
        self._engine = open_local_engine(
            self._model,
            spec.config,
            stop_ids=spec.stop_ids,
            max_context=spec.max_context,
            max_sequences=spec.max_sequences,
            adapters=spec.adapters,
        )
        self._engine.refresh(version, adapter)
        self._numbers: dict[str, int] = {}  # by sequence: the number of its request in flight

    def max_context(self) -> int:
        """Return the largest number of tokens in a sequence."""
        return self._engine.max_context

    def exchange(
        self, released: Sequence[str], requests: Requests, target: int, max_wait: float
    ) -> Generations:
        """Submit requests, and generate until enough replies are finished.

        Args:
            released: The sequences to forget before the requests are submitted.
            requests: The new requests, packed.
            target: The number of replies that is enough; see `replies_to_await`.
            max_wait: The time in seconds after which the call returns with what there is.

        Returns:
            The finished generations, packed.
        """
        for sequence in released:
            self._engine.release(sequence)
            self._numbers.pop(sequence, None)
        for number, request in unpack_requests(requests):
            self._numbers[request.sequence] = number
            self._engine.submit(request)
        wanted = replies_to_await(target, len(self._numbers))
        done: list[tuple[int, Generation]] = []
        until = time.monotonic() + max_wait
        while self._numbers and len(done) < wanted:
            for generation in self._engine.step():
                if generation.sequence in self._numbers:
                    done.append((self._numbers.pop(generation.sequence), generation))
            if time.monotonic() >= until:
                break
        return pack_generations(done)

    def refresh(self, weights: Weights | None, version: int, adapter: Adapter | None = None) -> None:
        """Load new weights into the model and the engine, or an adapter into the engine."""
        if weights is not None:
            load_weights(self._tensors, weights)
        self._engine.refresh(version, adapter)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def strip_weights(model: PreTrainedModel) -> bytes:
    """Pickle a model without the contents of its parameters and buffers."""
    buffer = io.BytesIO()
    pickler = _WeightStrippingPickler(buffer, protocol=5)
    pickler.names = {id(tensor): name for name, tensor in _named_tensors(model).items()}
    pickler.dump(model)
    return buffer.getvalue()


def export_weights(model: PreTrainedModel) -> Weights:
    """Return the contents of a model's parameters and buffers by name, as bytes: numpy has no bfloat16."""
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for name, tensor in _named_tensors(model).items()
    }


def restore_model(
    stripped: bytes, weights: Weights, device: torch.device
) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """Rebuild a model from `strip_weights` with weights on a device; return its tensors by name, and it."""
    unpickler = _EmptyTensorUnpickler(io.BytesIO(stripped))
    unpickler.device, unpickler.tensors = device, {}
    model = unpickler.load()
    load_weights(unpickler.tensors, weights)
    return unpickler.tensors, cast(PreTrainedModel, model)


def load_weights(tensors: Mapping[str, Tensor], weights: Weights) -> None:
    """Copy weights into the tensors of the same names, in place."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            content = torch.frombuffer(bytearray(weights[name]), dtype=tensor.dtype)
            tensor.copy_(content.view(tensor.shape))


def _named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters and buffers by name; shared ones appear once."""
    module = cast(nn.Module, model)
    return dict(chain(module.named_parameters(), module.named_buffers()))


class _WeightStrippingPickler(pickle.Pickler):
    """Pickler that writes a tensor's name, shape and dtype in place of its contents."""

    names: dict[int, str]

    def persistent_id(self, value: Any) -> Any:
        name = self.names.get(id(value)) if isinstance(value, Tensor) else None
        if name is None:
            return None
        return name, tuple(value.shape), value.dtype, isinstance(value, nn.Parameter)


class _EmptyTensorUnpickler(pickle.Unpickler):
    """Unpickler that creates an uninitialized tensor for every name that it reads."""

    device: torch.device
    tensors: dict[str, Tensor]

    def persistent_load(self, found: Any) -> Tensor:
        name, shape, dtype, learned = found
        if name not in self.tensors:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            self.tensors[name] = nn.Parameter(tensor, requires_grad=False) if learned else tensor
        return self.tensors[name]
