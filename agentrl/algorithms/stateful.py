"""Components that remember: what a training step updates and a checkpoint holds beside the learner."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Protocol, cast

from torch import Tensor

from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.errors import CheckpointError, ConfigError

_METHODS = ("update", "state_dict", "load_state_dict")
_PLAIN = (bool, int, float, str, bytes, type(None))


class Stateful(Protocol):
    """Component with a memory, or with parameters that it trains itself.

    Hooks read the state, and only `update` changes it. Every rank makes the same calls with the same rollout
    batches, so all ranks hold the same state as long as nothing else enters it: a random draw uses
    `derive_seed(context.seed, ...)`, and initial parameters come from a generator with a seed of its own. If
    a loss of the algorithm uses such parameters, it leaves gradients in them; `update` must clear those
    before it computes its own.
    """

    @property
    def name(self) -> str:
        """Return the key of the state in a checkpoint; another component must not have it."""
        ...

    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Learn from a step's scored rollout batch and its advantages, after the step's optimiser steps.

        It is called once per training step, before the diagnostics, but not in a step that has no rows to
        learn from. The rollout batch is on the learner's device.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers and text, in dicts and lists."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore a state; raise `CheckpointError` if it does not fit, for example for another tokenizer."""
        ...


def find_stateful(components: Iterable[object]) -> dict[str, Stateful]:
    """Return the stateful components by name, each once, in the order of their first use.

    A component is found as a hook, as the object whose method is a hook, among the arguments of
    `functools.partial`, and in the fields of a record such as `Term`. A closure does not show what it uses.

    Raises:
        ConfigError: If one lacks a name, or two have the same.
    """
    found: dict[str, Stateful] = {}
    for component in components:
        for part in _parts(component, {}):
            if not is_stateful(part):
                continue
            name = getattr(part, "name", None)
            if not isinstance(name, str) or not name:
                raise ConfigError(
                    f"{type(part).__qualname__} is stateful and its `name` is {name!r}, wanted the key of "
                    "its state in a checkpoint"
                )
            if found.setdefault(name, cast(Stateful, part)) is not part:
                raise ConfigError(
                    f"two stateful components are named {name!r} ({type(found[name]).__qualname__}, "
                    f"{type(part).__qualname__}), wanted one for each name"
                )
    return found


def is_stateful(component: object) -> bool:
    """Return whether a component has the methods of `Stateful`."""
    return not isinstance(component, type) and all(
        callable(getattr(component, method, None)) for method in _METHODS
    )


def states_of(components: Mapping[str, Stateful]) -> dict[str, dict[str, Any]]:
    """Return the state of each component by name.

    Raises:
        CheckpointError: If a state holds what could not be read from a checkpoint again.
    """
    states = {name: component.state_dict() for name, component in components.items()}
    for path, value in _leaves(states):
        if not isinstance(value, Tensor) and type(value) not in _PLAIN:
            raise CheckpointError(
                f"the state of {path} is of type {type(value).__module__}.{type(value).__qualname__}, wanted "
                "tensors, numbers and text in dicts and lists, which can be read from a checkpoint again"
            )
    return states


def _parts(component: object, seen: dict[int, object]) -> Iterator[object]:
    """Yield a component and what it is made of, as far as that shows, and each part once."""
    if id(component) in seen:
        return
    seen[id(component)] = component
    yield component
    if isinstance(component, partial):
        inner: Iterable[object] = (component.func, *component.args, *component.keywords.values())
    elif isinstance(component, tuple | list):
        inner = component
    elif is_dataclass(component) and not isinstance(component, type):
        inner = (getattr(component, item.name) for item in fields(component))
    else:
        owner = getattr(component, "__self__", None)
        inner = () if owner is None else (owner,)  # an owner without content, such as empty counts, is false
    for part in inner:
        yield from _parts(part, seen)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested dicts, lists and tuples, each with its dotted path."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}.{key}".removeprefix("."))
    else:
        yield path, tree
