"""An engine that is asked in batches: what an actor of `ray_engines` runs."""

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

from agentrl.policy.engine import Generation
from agentrl.policy.settings import EngineConfig
from agentrl.scale.local_engine import open_local_engine
from agentrl.scale.messages import Generations, Requests, pack_generations, replies_to_await, unpack_requests

Weights = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class EngineSpec:
    """What an actor needs to make its engine, beside the weights.

    Args:
        model: pickled without what its parameters and buffers hold.
        config: which engine.
        stop_ids: see `open_local_engine`, as the two below.
        max_context: tokens that a sequence may hold.
        max_sequences: of the actor.
        path: of the driver's imports.
    """

    model: bytes
    config: EngineConfig
    stop_ids: tuple[int, ...]
    max_context: int
    max_sequences: int
    path: Sequence[str]


class EngineHost:
    """What an actor runs: an engine with its own copy of the model.

    Args:
        spec: of the engine.
        weights: of the model.
        version: of the weights.
    """

    def __init__(self, spec: EngineSpec, weights: Weights, version: int) -> None:
        sys.path.extend(folder for folder in spec.path if folder not in sys.path)
        own = spec.config.actor_gpus > 0 and spec.config.name == "torch"
        device = torch.device("cuda" if own else "cpu")  # other engines place their copy by themselves
        self._tensors, self._model = restore_model(spec.model, weights, device)
        self._engine = open_local_engine(
            self._model,
            spec.config,
            stop_ids=spec.stop_ids,
            max_context=spec.max_context,
            max_sequences=spec.max_sequences,
        )
        self._engine.refresh(version)
        self._numbers: dict[str, int] = {}  # of the requests that are in flight, by sequence

    def max_context(self) -> int:
        """Tokens that a sequence may hold."""
        return self._engine.max_context

    def exchange(
        self, released: Sequence[str], requests: Requests, target: int, max_wait: float
    ) -> Generations:
        """Take messages, and generate until some of the replies that are owed make it worth while.

        Args:
            released: sequences to forget, before the requests are looked at.
            requests: packed.
            target: so many replies are enough; so are those of three requests in four.
            max_wait: seconds after which it returns with what there is.
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

    def refresh(self, weights: Weights, version: int) -> None:
        """Take up weights."""
        load_weights(self._tensors, weights)
        self._engine.refresh(version)

    def close(self) -> None:
        """End what the engine has started."""
        self._engine.close()


def strip_weights(model: PreTrainedModel) -> bytes:
    """A model pickled without what its parameters and buffers hold."""
    buffer = io.BytesIO()
    pickler = _WeightStrippingPickler(buffer, protocol=5)
    pickler.names = {id(tensor): name for name, tensor in _named_tensors(model).items()}
    pickler.dump(model)
    return buffer.getvalue()


def export_weights(model: PreTrainedModel) -> Weights:
    """What the parameters and buffers of a model hold, as bytes: numpy does not know bfloat16."""
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for name, tensor in _named_tensors(model).items()
    }


def restore_model(
    stripped: bytes, weights: Weights, device: torch.device
) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """A model from `strip_weights` with weights, on a device; also its tensors, by name."""
    unpickler = _EmptyTensorUnpickler(io.BytesIO(stripped))
    unpickler.device, unpickler.tensors = device, {}
    model = unpickler.load()
    load_weights(unpickler.tensors, weights)
    return unpickler.tensors, cast(PreTrainedModel, model)


def load_weights(tensors: Mapping[str, Tensor], weights: Weights) -> None:
    """Write weights into the tensors of their names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            content = torch.frombuffer(bytearray(weights[name]), dtype=tensor.dtype)
            tensor.copy_(content.view(tensor.shape))


def _named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    module = cast(nn.Module, model)
    return dict(chain(module.named_parameters(), module.named_buffers()))


class _WeightStrippingPickler(pickle.Pickler):
    """Writes the name, shape and type of a tensor in place of what it holds."""

    names: dict[int, str]

    def persistent_id(self, value: Any) -> Any:
        name = self.names.get(id(value)) if isinstance(value, Tensor) else None
        if name is None:
            return None
        return name, tuple(value.shape), value.dtype, isinstance(value, nn.Parameter)


class _EmptyTensorUnpickler(pickle.Unpickler):
    """Makes the tensors whose names it reads, with nothing in them."""

    device: torch.device
    tensors: dict[str, Tensor]

    def persistent_load(self, found: Any) -> Tensor:
        name, shape, dtype, learned = found
        if name not in self.tensors:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            self.tensors[name] = nn.Parameter(tensor, requires_grad=False) if learned else tensor
        return self.tensors[name]
