"""Features of a batch that components ask for by name; each is computed once and shared.

One function, in any file that is imported, adds one:

    @feature("turn_count")
    def turn_count(batch: Batch) -> Tensor:
        return turn_exists(batch).sum(dim=1)

A component asks for it with `@requires("turn_count")` and reads it with `feature_of(batch, "turn_count")`. A
function marked `@mini_batch_feature` gets the mini-batch instead. What a feature needs itself, scores or
other features, it declares by `@requires` below its name. `states`, `groups` and `features` of
`agentrl.algorithms` define those that are built in.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from agentrl.algorithms.hooks import SCORED, MiniBatch, requirements
from agentrl.algorithms.named_functions import NamedFunctions
from agentrl.data.batch import Batch
from agentrl.errors import RequirementError

Function = TypeVar("Function", bound=Callable[..., Tensor])

_functions = NamedFunctions("feature", inputs=1)
_of_mini_batch: set[str] = set()


def feature(name: str) -> Callable[[Function], Function]:
    """Register a feature of the episodes, turns or groups of a rollout batch.

    The function takes the batch and returns [E, ...], or a single number. It is called once per rollout
    batch, and hooks of a mini-batch read the same values, since a mini-batch holds all episodes. A second
    parameter is the argument after the colon; its type declares the bounds.

    Raises:
        ConfigError: If another function has the name.
    """
    return partial(_register, name, of_mini_batch=False)


def mini_batch_feature(name: str) -> Callable[[Function], Function]:
    """Register a feature of the tokens of a mini-batch.

    The function takes the mini-batch with its mask and its current ratio, and returns [B, T, ...]. `clip`,
    `weights` and the `where` of terms can read it, and losses the part of their rows. Diagnostics read that
    of the whole rollout batch, which has no `current`.

    Raises:
        ConfigError: If another function has the name.
    """
    return partial(_register, name, of_mini_batch=True)


def feature_of(source: Batch | MiniBatch, name: str) -> Tensor:
    """Return a feature that a component requires by name.

    A feature of a batch that nothing requires, as in a hook that you call yourself, is computed for this call
    alone, if the batch is whole.

    Args:
        source: The batch, or the mini-batch, which has the features of its batch as well.
        name: The name, with its argument.

    Raises:
        RequirementError: If no component requires it, and a part of the rows does not suffice to compute it.
    """
    batch, known = (source, {}) if isinstance(source, Batch) else (source.batch, source.features)
    if batch.whole and is_feature(name) and not _is_of_mini_batch(name):
        batch = with_features(batch, [name])
    known = {**batch.features, **known}
    if name not in known:
        raise RequirementError(
            f"{name} is not among the features of this batch ({', '.join(known) or 'none'}); mark the "
            f"component that reads it with @requires({name!r})"
        )
    return known[name]


def with_features(batch: Batch, requires: Iterable[str]) -> Batch:
    """Return a rollout batch with those of the required features that it does not hold yet.

    Raises:
        ValueError: If a feature has another shape than [E, ...] and is not a single number.
    """
    for name in sorted(name for name in requires if is_feature(name) and not _is_of_mini_batch(name)):
        if name in batch.features:
            continue
        function = _functions.bind(name)
        batch = with_features(batch, requirements(function))
        with torch.no_grad():
            values = function(batch)
        if values.dim() and len(values) != len(batch.episodes):
            raise ValueError(
                f"feature {name} has shape {tuple(values.shape)}, wanted [{len(batch.episodes)}, ...]"
            )
        batch = replace(batch, features={**batch.features, name: values})
    return batch


def with_mini_batch_features(mini: MiniBatch, requires: Iterable[str]) -> MiniBatch:
    """Return a mini-batch with those of the required features that it does not hold yet.

    Raises:
        ValueError: If a feature has another shape than [B, T, ...].
    """
    shape = mini.batch.tokens.shape
    for name in sorted(name for name in requires if is_feature(name) and _is_of_mini_batch(name)):
        if name in mini.features:
            continue
        function = _functions.bind(name)
        mini = with_mini_batch_features(mini, requirements(function))
        with torch.no_grad():
            values = function(mini)
        if values.shape[:2] != shape:
            raise ValueError(f"feature {name} has shape {tuple(values.shape)}, wanted {[*shape, ...]}")
        mini = replace(mini, features={**mini.features, name: values})
    return mini


def is_feature(requirement: str) -> bool:
    """Return whether a requirement has the name of a registered feature."""
    return _base(requirement) in _functions


def feature_fault(requirement: str) -> str | None:
    """Return why a requirement is not a feature that can be computed; None if it is, or resembles none."""
    if not is_feature(requirement):
        return _functions.suggestion(_base(requirement))
    try:
        _functions.bind(requirement)
    except RequirementError as error:
        return str(error)
    return None


def with_sources(requires: Iterable[str]) -> frozenset[str]:
    """Return requirements together with what the features among them require themselves."""
    names = frozenset(requires)
    needed = frozenset[str]().union(
        *(requirements(_functions.function(_base(name))) for name in names if is_feature(name))
    )
    return names if needed <= names else with_sources(names | needed)


def features_read_scores(requires: Iterable[str]) -> bool:
    """Return whether a required feature is computed from results of the scoring pass."""
    return any(with_sources({name}) & SCORED for name in requires if is_feature(name))


def _register(name: str, function: Function, *, of_mini_batch: bool) -> Function:
    _functions.add(name, function)
    (_of_mini_batch.add if of_mini_batch else _of_mini_batch.discard)(name)
    return function


def _is_of_mini_batch(requirement: str) -> bool:
    return _base(requirement) in _of_mini_batch


def _base(requirement: str) -> str:
    return requirement.partition(":")[0]
