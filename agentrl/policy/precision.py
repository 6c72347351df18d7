"""The precision of weights, and whether all of them are finite."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def engine_copy(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of a model with weights of another dtype, or the model itself where they have it already.

    Buffers keep their dtype: rotary frequencies rounded to bfloat16 would shift distant positions.
    """
    weights = list(model.parameters())
    if all(weight.dtype == dtype for weight in weights):
        return model
    rounded = {
        id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
        for weight in weights
    }
    return copy.deepcopy(model, dict(rounded))  # the memo makes deepcopy use the rounded weights


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold nan or inf; takes a single pass where there are none."""
    named = [(name, values) for name, values in tensors if values.numel() and values.is_floating_point()]
    if not named or math.isfinite(nn.utils.get_total_norm([values for _, values in named], math.inf)):
        return []
    return [name for name, values in named if not bool(values.isfinite().all())]


def named_in_short(names: Sequence[str]) -> str:
    """Return a short mention of some tensors for a sentence: the first name, and how many more there are.

    >>> named_in_short(["norm.weight"]), named_in_short(["norm.weight", "head.weight", "head.bias"])
    ('norm.weight', 'norm.weight and 2 more')
    """
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def has_fast_bfloat16() -> bool:
    """Return whether this machine's CPU multiplies bfloat16 numbers by itself; others emulate it slowly."""
    able = torch.cpu.get_capabilities()
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
