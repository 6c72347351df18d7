"""The check that functions of several tensors share."""

from torch import Tensor


def same_shape(name: str, value: Tensor, other: str, wanted: Tensor) -> None:
    """Refuse two tensors that do not describe the same things.

    Raises:
        ValueError: naming both, and both shapes.
    """
    if value.shape != wanted.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, wanted that of {other}, {tuple(wanted.shape)}"
        )
