"""Tools: an environment's actions as functions, for policies that reply with tool calls."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import Any

from agentrl.values import ValueFaultError, as_json, as_text, describe_value

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
_KEYS = ("name", "description", "parameters", "action")


class CallFaultError(Exception):
    """Raised for an invalid tool call. The message holds words of the declarations and none of the policy."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function whose call is an action.

    >>> search = read_tool({
    ...     "name": "search", "description": "Search the shop.",
    ...     "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    ...     "action": "search[{query}]",
    ... })
    >>> search.action_of({"query": "red shoes"}), search.arguments_of("search[red shoes]")
    ('search[red shoes]', {'query': 'red shoes'})

    Args:
        name: The name of the function.
        description: What it does, for the policy.
        parameters: The JSON schema of its arguments, as JSON text.
        action: The text of the action, with each argument's name in braces.
    """

    name: str
    description: str
    parameters: str
    action: str

    @property
    def properties(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the schema of each argument, by name."""
        return _properties(self.parameters)

    @property
    def declaration(self) -> dict[str, Any]:
        """Return the declaration that chat templates take."""
        parameters = json.loads(self.parameters)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def action_of(self, arguments: Mapping[str, Any]) -> str:
        """Return the action of a call.

        Raises:
            CallFaultError: An argument is missing, unknown or of another type.
        """
        wanted = f"wanted {', '.join(self.properties) or 'none'}"
        for name in self.properties:
            if name not in arguments:
                raise CallFaultError(f"argument {name} of {self.name} is missing")
        if len(arguments) > len(self.properties):
            raise CallFaultError(f"unknown argument of {self.name}, {wanted}")
        written = {name: self._write(name, arguments[name]) for name in self.properties}
        parts = Formatter().parse(self.action)
        return "".join(text + (written[name] if name else "") for text, name, _, _ in parts)

    def arguments_of(self, action: str) -> dict[str, Any] | None:
        """Return the arguments of the call whose action this is; None if there is no such call."""
        found = _pattern(self.action).fullmatch(action)
        if found is None:
            return None
        try:
            arguments = {name: self._read(name, found[name]) for name in self.properties}
            return arguments if self.action_of(arguments) == action else None
        except (CallFaultError, ValueError, RecursionError):
            return None

    def _write(self, name: str, value: Any) -> str:
        """Return an argument as it stands in an action: text as it is, everything else as JSON."""
        schema = self.properties[name]
        kind = schema["type"]
        if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
            raise CallFaultError(f"argument {name} of {self.name} has another type, wanted {kind}")
        if "enum" in schema and value not in schema["enum"]:
            allowed = ", ".join(str(choice) for choice in schema["enum"])
            raise CallFaultError(f"argument {name} of {self.name} has another value, wanted one of {allowed}")
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def _read(self, name: str, text: str) -> Any:
        return text if self.properties[name]["type"] == "string" else json.loads(text)


def act_tool(instructions: str = "") -> Tool:
    """Return the tool of an environment that declares none: its argument is the action.

    Args:
        instructions: What to do in the environment, and how an action is written.
    """
    command = {"type": "string", "description": "The next command."}
    schema = {"type": "object", "properties": {"command": command}, "required": ["command"]}
    return Tool("act", instructions or "Act in the environment.", _text_of(schema), "{command}")


def call_of(tools: Sequence[Tool], action: str) -> tuple[Tool, dict[str, Any]] | None:
    """Return the first tool with a call for this action, and its arguments; None if there is none."""
    calls = ((tool, tool.arguments_of(action)) for tool in tools)
    return next(((tool, arguments) for tool, arguments in calls if arguments is not None), None)


def action_of(tools: Sequence[Tool], name: object, arguments: object) -> str:
    """Return the action of a call.

    Raises:
        CallFaultError: There is no such tool, or its arguments are others.
    """
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        raise CallFaultError(f"unknown tool, wanted {' or '.join(tool.name for tool in tools)}")
    if not isinstance(arguments, dict):
        raise CallFaultError(f"the arguments of {tool.name} are no object")
    return tool.action_of(arguments)


def read_tools(declared: object) -> tuple[Tool, ...]:
    """Return the tools that an environment declares in `action_tools`.

    Raises:
        ValueFaultError: A declaration is invalid; the message says where.
    """
    if not isinstance(declared, list | tuple):
        raise ValueFaultError(f"action_tools is {describe_value(declared)}, wanted a list of mappings")
    tools = []
    for place, each in enumerate(declared):
        try:
            tools.append(read_tool(each))
        except ValueFaultError as fault:
            raise ValueFaultError(f"action_tools[{place}]{fault}") from fault
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueFaultError(f"action_tools names a tool twice: {', '.join(names)}")
    return tuple(tools)


def read_tool(declared: object) -> Tool:
    """Return a tool from its declaration: name, description, parameters and action.

    Raises:
        ValueFaultError: The declaration is invalid.
    """
    if not isinstance(declared, Mapping) or {*declared} - {*_KEYS} or not {"name", "action"} <= {*declared}:
        raise ValueFaultError(f" is {describe_value(declared)}, wanted a mapping with {', '.join(_KEYS)}")
    try:
        plain = as_json(declared)
        for key in ("name", "description", "action"):
            as_text(plain.get(key, ""))
    except ValueFaultError as fault:
        raise ValueFaultError(f" {fault}") from fault
    name, action = plain["name"], plain["action"]
    if not _NAME.fullmatch(name):
        raise ValueFaultError(f".name is {name!r}, wanted letters, digits, _ and -, at most 64")
    parameters = plain.get("parameters", {"type": "object", "properties": {}})
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or parameters.get("type") != "object":
        raise ValueFaultError('.parameters: wanted {"type": "object", "properties": {...}}')
    for key, schema in properties.items():
        if not _PARAMETER.fullmatch(key):
            raise ValueFaultError(f".parameters: {key!r}, wanted letters, digits and _, at most 64")
        if not isinstance(schema, dict) or schema.get("type") not in _KINDS:
            raise ValueFaultError(f".parameters.{key}: wanted a type, one of {', '.join(_KINDS)}")
        if not isinstance(schema.get("enum", []), list):
            raise ValueFaultError(f".parameters.{key}.enum: wanted a list")
    if sorted(_named(action)) != sorted(properties):
        wanted = f"each of {', '.join(properties)} once, in braces" if properties else "no braces"
        raise ValueFaultError(f".action is {action!r}, wanted {wanted}")
    required = parameters.setdefault("required", list(properties))
    if not isinstance(required, list) or {*map(str, required)} != {*properties}:
        raise ValueFaultError(".parameters.required: wanted all parameters, since the action holds each")
    return Tool(name, plain.get("description", ""), _text_of(parameters), action)


def _named(action: str) -> list[str]:
    """Return the names in braces, with "" for braces that hold more than a name."""
    try:
        parts = [part for part in Formatter().parse(action) if part[1] is not None]
    except ValueError as error:
        raise ValueFaultError(f".action is {action!r}: {error}") from error
    return [str(name) if not spec and not conversion else "" for _, name, spec, conversion in parts]


def _text_of(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False)


@cache
def _properties(parameters: str) -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = json.loads(parameters)["properties"]
    return found


@cache
def _pattern(action: str) -> re.Pattern[str]:
    """Return the pattern of the actions that a template writes."""
    parts = Formatter().parse(action)
    groups = (re.escape(text) + (f"(?P<{name}>.*?)" if name else "") for text, name, _, _ in parts)
    return re.compile("".join(groups), re.DOTALL)
