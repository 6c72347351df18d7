"""Shape check for functions of several tensors."""

from torch import Tensor


def same_shape(name: str, value: Tensor, other: str, wanted: Tensor) -> None:
    """Refuse two tensors of different shapes.

    Raises:
        ValueError: Names both tensors and their shapes.
    """
    if value.shape != wanted.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, wanted that of {other}, {tuple(wanted.shape)}"
        )
