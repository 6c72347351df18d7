"""A linear layer with an adapter that keeps and allocates nothing beyond its result; imports peft."""

from typing import Any

import peft.tuners.lora
from torch import Tensor


class LoraLinear(peft.tuners.lora.Linear):
    """peft's layer for one adapter, whose output is added in place.

        x W^T + b + scaling * (x A^T) B^T

    peft's own forward allocates three temporary tensors of the size of the result. They are freed between
    activations that stay, in pieces that the allocator cannot reuse, so that a pass takes far more memory
    than its activations.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the layer and its adapter; [..., out]."""
        layer: Any = self
        (adapter,) = layer.active_adapters
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        down = layer.lora_A[adapter](x).to(result.dtype)
        up = layer.lora_B[adapter].weight.to(result.dtype)
        rows = result.view(-1, result.shape[-1])
        rows.addmm_(down.flatten(0, -2), up.t(), alpha=layer.scaling[adapter])
        return result
