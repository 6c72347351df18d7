"""The largest number of tokens in one sequence of a model; the only place that computes it."""

from collections.abc import Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from agentrl.errors import ConfigError

_UNBOUNDED = 2**31
_FURTHEST = 2**22  # the end of the search for a rotary switch in models without a number of positions
_NEAR = 4  # the number of positions whose rotary angles are compared
_known: "WeakKeyDictionary[nn.Module, tuple[int, int]]" = WeakKeyDictionary()


def context_limit(model: PreTrainedModel) -> int:
    """Return the largest sequence length of the model itself: its positions, window or rotary switch.

    A sliding window is a limit if every layer has one. Where some layers see everything, as in Gemma 3, only
    their limit counts. With `longrope`, all rotary angles change as soon as any sequence of a batch exceeds
    the length of the original training: the earlier tokens of that sequence, and all of its neighbours, would
    then be read with other angles than they were sampled with. The library recomputes its cache there.
    """
    return min(_limits(model))


def context_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Return the largest sequence length: the one asked for, or the model's own limit if that is lower.

    Args:
        model: The model that reads the sequences; one on the meta device works too.
        wanted: The value of `policy.max_context`; None asks for the model's limit.

    Raises:
        ConfigError: If `wanted` exceeds the rotary switch, beyond which the model computes differently.
    """
    positions, switch = _limits(model)
    if wanted is None:
        return min(positions, switch)
    if switch < min(wanted, positions):
        raise ConfigError(
            f"policy.max_context is {wanted}, wanted at most {switch}: {type(model).__name__} uses other "
            f"rotary frequencies, at earlier tokens too, as soon as a sequence is longer than {switch} tokens"
        )
    return min(wanted, positions)


def shortened(model: PreTrainedModel, wanted: int | None) -> str | None:
    """Return a message that the model holds fewer tokens than asked for; None where it holds them all."""
    used = context_length(model, wanted)
    if wanted is None or used == wanted:
        return None
    why = ", its window in every layer" if used == _window(model.config.get_text_config()) else ""
    return (
        f"policy.max_context={wanted}, but a sequence of {type(model).__name__} "
        f"({model.name_or_path or 'made from scratch'}) holds at most {used} tokens{why}: {used} is used"
    )


def _limits(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of positions, and the length beyond which the rotary angles change."""
    found = _known.get(model)
    if found is None:
        config = model.config.get_text_config()
        positions = min(getattr(config, "max_position_embeddings", None) or _UNBOUNDED, _window(config))
        found = _known[model] = positions, _rotary_switch(model, min(positions, _FURTHEST))
    return found


def _window(config: PreTrainedConfig) -> int:
    """Return the sliding window if every layer has one, else a number that is no limit."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "use_sliding_window", True) and set(kinds) == {"sliding_attention"}
    return (getattr(config, "sliding_window", None) if slides else None) or _UNBOUNDED


def _rotary_switch(model: PreTrainedModel, positions: int) -> int:
    """Return the longest sequence length whose first positions have the rotary angles of short ones."""
    switches = [_UNBOUNDED]
    for part in model.modules():
        if any(name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)):
            switches += [_switch_of(part, kind, positions) for kind in _kinds(part)]
    return min(switches)


def _kinds(part: nn.Module) -> Iterator[str | None]:
    """Yield the kinds of layers for which a rotary embedding has different angles."""
    kinds = getattr(part, "rope_type", None)
    yield from kinds if isinstance(kinds, dict) else [None]


def _switch_of(part: nn.Module, kind: str | None, positions: int) -> int:
    """Find the switch of one rotary embedding by bisection."""
    try:
        near = _near_angles(part, kind, _NEAR)
    except Exception:  # its signature differs, for example with three positions for each token
        return _named_switch(part)
    if _near_angles(part, kind, positions) == near:
        return _UNBOUNDED
    same, other = _NEAR, positions
    while other - same > 1:
        middle = (same + other) // 2
        if _near_angles(part, kind, middle) == near:
            same = middle
        else:
            other = middle
    return same


def _named_switch(part: nn.Module) -> int:
    """Return the switch that config.json names."""
    settings = getattr(getattr(part, "config", None), "rope_parameters", None) or {}
    switches = [
        each["original_max_position_embeddings"]
        for each in (settings, *(value for value in settings.values() if isinstance(value, dict)))
        if each.get("rope_type") == "longrope"
    ]
    return min(switches, default=_UNBOUNDED)


def _near_angles(part: nn.Module, kind: str | None, length: int) -> list[Any]:
    """Return the angles of the first positions in a sequence of `length`, from a newly built embedding."""
    config: Any = part.config
    with torch.device("cpu"):
        embedding = cast(Any, type(part))(config=config)  # new, since some remember the longest length
        places = torch.tensor([[*range(_NEAR), length - 1]])
        angles = embedding(torch.zeros(1, 1, 1), places, **({} if kind is None else {"layer_type": kind}))
    found: list[Tensor] = [angles] if isinstance(angles, Tensor) else list(angles)
    return [each[..., :_NEAR, :].tolist() for each in found]
