"""A model's architecture and weights in the form that vLLM reads; does not import vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def shape_of(config: Any) -> Mapping[str, Any]:
    """Return the settings in which two models must agree for the weights of one to fit the other."""
    return {name: getattr(config, name, None) for name in SHAPE}


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by the names that their files have; tied weights appear once."""
    for name, weight in cast(nn.Module, model).named_parameters():
        yield name, weight.detach()


def write_architecture(model: PreTrainedModel, folder: Path) -> None:
    """Write the config.json that vLLM builds a model from."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights as one file of safetensors."""
    folder.mkdir(parents=True)
    weights = {name: weight.contiguous() for name, weight in named_weights(model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
