"""Errors for unknown names, with suggestions."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

from agentrl.errors import ConfigError

_SHOWN = 8


def unknown(what: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not one of the known ones.

    Args:
        what: The kind of name, such as "environment" or "split of agentrl/ALFWorld-v0".
        name: The unknown name.
        known: The existing names; only the first 1000 are considered.

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


def named_task(environment: str, task: str) -> str:
    """Return the id of a task among those of several environments.

    >>> named_task("ALFWorld", "train-3")
    'ALFWorld/train-3'
    """
    return f"{environment}/{task}"


def split_task(task: str) -> tuple[str, str]:
    """Return the name of the environment and its own id of a task, see `named_task`."""
    environment, _, own = task.partition("/")
    return environment, own
