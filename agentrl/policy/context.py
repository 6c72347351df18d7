"""How many tokens one sequence of a model may hold. Nothing else in the project works it out."""

from collections.abc import Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from agentrl.errors import ConfigError

_UNBOUNDED = 2**31
_FURTHEST = 2**22  # where the search for a switch ends in a model that names no number of positions
_NEAR = 4  # positions whose rotary angles are compared
_known: "WeakKeyDictionary[nn.Module, tuple[int, int]]" = WeakKeyDictionary()


def context_limit(model: PreTrainedModel) -> int:
    """Tokens that one sequence may hold, by the model alone: its positions, its window, or its rotary switch.

    A sliding window limits a model of which every layer has one. Where some see everything, as in Gemma 3,
    theirs is the limit, and the others slide. The rotary angles of `longrope` are others as soon as any
    sequence of a batch is longer than the length that the model was first trained with. A longer sequence
    would read what was said before it got so long differently than it was said, and so would its neighbours;
    the library, too, begins anew there.
    """
    return min(_limits(model))


def context_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens that one sequence may hold: as many as wanted, or as the model can where those are fewer.

    Args:
        model: that reads the sequences; one on the meta device will do.
        wanted: `policy.max_context`; None asks for all that the model can.

    Raises:
        ConfigError: for more than the rotary switch allows, where the model would go on in another way.
    """
    positions, switch = _limits(model)
    if wanted is None:
        return min(positions, switch)
    if switch < min(wanted, positions):
        raise ConfigError(
            f"policy.max_context is {wanted}, wanted at most {switch}: {type(model).__name__} turns to other "
            f"rotary frequencies as soon as a sequence is longer than {switch} tokens, for all that stands "
            "before as well"
        )
    return min(wanted, positions)


def shortened(model: PreTrainedModel, wanted: int) -> str | None:
    """What is to be said where fewer tokens are used than were asked for; None where all are."""
    used = context_length(model, wanted)
    if used == wanted:
        return None
    why = ", its window in every layer" if used == _window(model.config.get_text_config()) else ""
    return (
        f"policy.max_context={wanted}, but a sequence of {type(model).__name__} "
        f"({model.name_or_path or 'made from scratch'}) holds at most {used} tokens{why}: {used} is used"
    )


def _limits(model: PreTrainedModel) -> tuple[int, int]:
    """How many positions are seen, and the length beyond which rotary angles are others."""
    found = _known.get(model)
    if found is None:
        config = model.config.get_text_config()
        positions = min(getattr(config, "max_position_embeddings", None) or _UNBOUNDED, _window(config))
        found = _known[model] = positions, _rotary_switch(model, min(positions, _FURTHEST))
    return found


def _window(config: PreTrainedConfig) -> int:
    """That of all layers; of a model where some have none, no limit."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "use_sliding_window", True) and set(kinds) == {"sliding_attention"}
    return (getattr(config, "sliding_window", None) if slides else None) or _UNBOUNDED


def _rotary_switch(model: PreTrainedModel, positions: int) -> int:
    """The length of the longest sequence whose first positions are turned as they are in short ones."""
    switches = [_UNBOUNDED]
    for part in model.modules():
        if any(name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)):
            switches += [_switch_of(part, kind, positions) for kind in _kinds(part)]
    return min(switches)


def _kinds(part: nn.Module) -> Iterator[str | None]:
    """The kinds of layers that a rotary embedding tells apart."""
    kinds = getattr(part, "rope_type", None)
    yield from kinds if isinstance(kinds, dict) else [None]


def _switch_of(part: nn.Module, kind: str | None, positions: int) -> int:
    try:
        near = _near_angles(part, kind, _NEAR)
    except Exception:  # one that is called in another way, say with three positions for each token
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
    """By the names in config.json."""
    settings = getattr(getattr(part, "config", None), "rope_parameters", None) or {}
    switches = [
        each["original_max_position_embeddings"]
        for each in (settings, *(value for value in settings.values() if isinstance(value, dict)))
        if each.get("rope_type") == "longrope"
    ]
    return min(switches, default=_UNBOUNDED)


def _near_angles(part: nn.Module, kind: str | None, length: int) -> list[Any]:
    """How the first positions are turned in a sequence of a length, by a new embedding without a past."""
    config: Any = part.config
    with torch.device("cpu"):
        fresh = cast(Any, type(part))(config=config)
        places = torch.tensor([[*range(_NEAR), length - 1]])
        angles = fresh(torch.zeros(1, 1, 1), places, **({} if kind is None else {"layer_type": kind}))
    found: list[Tensor] = [angles] if isinstance(angles, Tensor) else list(angles)
    return [each[..., :_NEAR, :].tolist() for each in found]
