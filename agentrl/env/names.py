"""Refusing a name that is not known, with the nearest ones that are."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

from agentrl.errors import ConfigError

_SHOWN = 8


def unknown(what: str, name: object, known: Iterable[str]) -> ConfigError:
    """Build the error for `name`, which is not one of `known`.

    Args:
        what: what was named, with its place, such as "environment" or "split of agentrl/ALFWorld-v0".
        name: what was asked for.
        known: the names that exist; at most 1000 of them are looked at.

    >>> str(unknown("split", "trian", ["train", "test"]))
    "split 'trian' is unknown; did you mean 'train'? Known: train, test"
    """
    candidates = [str(candidate) for candidate in islice(known, 1000)]
    near = get_close_matches(str(name), candidates, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    shown = ", ".join(candidates[:_SHOWN]) + (", …" if len(candidates) > _SHOWN else "")
    return ConfigError(f"{what} {_short(name)} is unknown{hint} Known: {shown or 'none'}")


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 200 else text[:200] + "…"
