"""Functions that components ask for by name, with at most one argument after a colon, as in `topk:10`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from agentrl.errors import ConfigError, RequirementError


@dataclass(frozen=True)
class NamedFunction:
    """A registered function, with the parameter and the type of its argument if it takes one."""

    function: Callable[..., Any]
    parameter: Parameter | None
    argument: TypeAdapter[Any] | None

    @property
    def optional(self) -> bool:
        """Return whether the argument may be left out."""
        return self.parameter is None or self.parameter.default is not Parameter.empty


class NamedFunctions:
    """Registry of the functions of one kind.

    Args:
        kind: What one of them is called in messages.
        inputs: The number of its inputs. A parameter after these is the argument; its type declares the
            bounds.
    """

    def __init__(self, kind: str, inputs: int) -> None:
        self.kind = kind
        self._inputs = inputs
        self._functions: dict[str, NamedFunction] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Register a function.

        Raises:
            ConfigError: If another function has the name.
        """
        known = self._functions.get(name)
        if known is not None and _qualified_name(known.function) != _qualified_name(function):
            raise ConfigError(
                f"two {self.kind}s are named {name!r}: {_qualified_name(known.function)} and "
                f"{_qualified_name(function)}"
            )
        parameter = next(iter(list(signature(function).parameters.values())[self._inputs :]), None)
        argument = None
        if parameter is not None:
            declared = get_type_hints(function, include_extras=True).get(parameter.name, str)
            argument = TypeAdapter(declared, config=ConfigDict(allow_inf_nan=False))
        self._functions[name] = NamedFunction(function, parameter, argument)

    def function(self, name: str) -> Callable[..., Any]:
        """Return the function that is registered under a name."""
        return self._functions[name].function

    def usage(self, name: str) -> str:
        """Return how a function is asked for, as in `topk:K`."""
        found = self._functions[name]
        if found.parameter is None:
            return name
        argument = f":{found.parameter.name.upper()}"
        return f"{name}[{argument}]" if found.optional else f"{name}{argument}"

    def suggestion(self, name: str) -> str | None:
        """Return a question for a name that resembles a registered one; None if none does."""
        close = get_close_matches(name, self._functions, n=1)
        return f"did you mean {self.usage(close[0])}?" if close else None

    def bind(self, request: str) -> Callable[..., Any]:
        """Return the function of a request such as `topk:10`, with its argument.

        Raises:
            RequirementError: If the argument is missing, superfluous or out of bounds.
        """
        name, _, argument = request.partition(":")
        found = self._functions[name]
        if not argument and found.optional:
            return found.function
        if not argument:
            raise RequirementError(f"it needs an argument: {self.usage(name)}")
        if found.parameter is None or found.argument is None:
            raise RequirementError(f"{name} takes no argument")
        try:
            value = found.argument.validate_python(argument)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"]
            raise RequirementError(f"{found.parameter.name}: {wrong[:1].lower()}{wrong[1:]}") from error
        return partial(found.function, **{found.parameter.name: value})


def _qualified_name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
