"""Replies that are tool calls in the form of a chat template, and the action of the call in a reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from agentrl.env.tools import CallFaultError, Tool, action_of, call_of
from agentrl.errors import ConfigError
from agentrl.policy.chat import (
    END_THINK,
    SYSTEM_SLOT,
    TEMPLATE_FAILURES,
    THINK,
    ChatPieces,
    check_system_role,
    slot,
)
from agentrl.policy.dialogue import ParsedReply
from agentrl.policy.prompt import ReplyWords
from agentrl.policy.reply_formats import TASK
from agentrl.policy.tool_template import (
    Parts,
    Render,
    ToolPieces,
    ToolStyle,
    UnsuitedError,
    check_declares,
    hermes_style,
    native_style,
    probe_tools,
)
from agentrl.values import MAX_TEXT_CHARS, ValueFaultError, as_json

INVALID = "invalid tool call: "  # begins the action of a reply without a valid call
_PYTHON_TAG = "<|python_tag|>"  # Llama 3 may write it before a call
_BAD_VALUES = "a key twice, no valid text or number, or too many or too deeply nested values"
_ASKS = "call one of your tools."


class ToolCallFormat:
    """Format of replies that are calls of an environment's tools, in the form of a chat template.

    Args:
        style: How the template is told of the tools.
        tools: The tools.
        probe: The text that the template renders around turns and in calls.

    Attributes:
        reason: Why the declarations stand in the system message; None where the template writes them.
        arguments: The arguments with which the template writes them.
    """

    thinks = False

    def __init__(
        self, style: ToolStyle, tools: Sequence[Tool], probe: ToolPieces, reason: str | None
    ) -> None:
        self.reason, self.arguments = reason, style.arguments
        self._style, self._tools, self._texts = style, tools, probe.texts
        self._betweens, self._shape, self._escapes = probe.betweens, probe.shape, probe.escapes
        first = probe.texts[tools[0].name]
        marker, separator = first.before, ""
        if self._shape.name is None:
            marker, _, separator = first.before.partition(tools[0].name)
        self._marker, self._separator, self._after = marker.strip(), separator.strip(), first.after.strip()

    @property
    def instructions(self) -> str:
        """Return the text before the first observation."""
        return f"{TASK} {_ASKS}"

    @property
    def words(self) -> ReplyWords:
        """Return what a prompt template can say of the format."""
        return ReplyWords(_ASKS, write=self.around)

    @property
    def written(self) -> str:
        """Return the text around the JSON of a call, in which the names of tokens are tokens."""
        return "".join(text.before + text.after for text in self._texts.values())

    def system_message(self, message: str | None) -> str | None:
        """Return the system message, with the declarations where they belong there."""
        return "\n\n".join(filter(None, (message, self._style.system))) or message

    def probe(self, render: Render) -> ChatPieces:
        """Find the fixed text around a turn; see `agentrl.policy.chat.probe_template`."""
        return probe_tools(render, self._style, self._tools).pieces

    def result(self, text: str) -> str:
        """Return the text of a result as the template writes it."""
        return json.dumps(text, ensure_ascii=False)[1:-1] if self._escapes else text

    def between(self, command: str) -> str:
        """Return the text between a reply with this action and its result, which may name the tool."""
        found = call_of(self._tools, command)
        return self._betweens[self._tools[0].name if found is None else found[0].name]

    def around(self, command: str) -> Parts:
        """Return the call of an action in three parts; an action that no call has stays as it is."""
        found = call_of(self._tools, command)
        return ("", command, "") if found is None else self._texts[found[0].name].write(found[1])

    def read(self, said: str, _ended: bool) -> ParsedReply:
        """Return the action of the call in a reply, or what is wrong with it."""
        try:
            return ParsedReply(self._read(said), valid=True)
        except CallFaultError as fault:
            return ParsedReply(f"{INVALID}{fault}", valid=False)

    def _read(self, said: str) -> str:
        if len(said) > MAX_TEXT_CHARS:
            raise CallFaultError("the reply is too long")
        if said.startswith(THINK):
            said = said.partition(END_THINK)[2].strip()
        call = said.partition(self._marker)[2] if self._marker else said.removeprefix(_PYTHON_TAG)
        name, call = ("", call) if self._shape.name else self._split_name(call)
        value, rest = _read_json(call.lstrip())
        if not rest.startswith(self._after):
            raise CallFaultError(f"the call does not end in {self._after}")
        if rest := rest.removeprefix(self._after).strip():
            again = self._marker in rest if self._marker else rest.lstrip("; \n").startswith("{")
            raise CallFaultError("more than one call" if again else "text after the call")
        return self._action(value, name)

    def _split_name(self, call: str) -> tuple[str, str]:
        """Split a call whose name stands before its JSON."""
        name, found, rest = call.partition(self._separator or "{")
        return name.strip(), rest if self._separator else found + rest

    def _action(self, value: Any, name: object) -> str:
        """Return the action of the JSON of a call, and of its name if that stands elsewhere."""
        if self._shape.listed:
            if not isinstance(value, list) or not value:
                raise CallFaultError("the call is not in a list")
            if len(value) > 1:
                raise CallFaultError("more than one call")
            value = value[0]
        if not isinstance(value, dict):
            raise CallFaultError("the call is no object")
        if self._shape.arguments is None:
            return action_of(self._tools, name, value)
        given = [key for key in ("arguments", "parameters") if key in value]
        key = self._shape.arguments if self._shape.arguments in value or not given else given[0]
        if self._shape.name is not None:
            if self._shape.name not in value:
                raise CallFaultError("the call has no name")
            name = value[self._shape.name]
        if key not in value:
            raise CallFaultError("the call has no arguments")
        if value.keys() - {self._shape.name, key, "id", "type"}:
            raise CallFaultError("the call has keys beside its name and its arguments")
        return action_of(self._tools, name, value[key])


def tool_call_format(
    render: Render, tools: Sequence[Tool], spells_markup: Callable[[str], bool]
) -> ToolCallFormat:
    """Return the format of calls that a chat template writes, or that of Hermes where it writes none.

    Args:
        render: Renders a dialogue.
        tools: The tools.
        spells_markup: Whether a text, encoded as the template's own, would hold markup tokens.

    Raises:
        ConfigError: If the template can write neither.
    """
    native, hermes = native_style(tools), hermes_style(tools)
    try:
        if spells_markup(json.dumps(native.arguments["tools"], ensure_ascii=False)):
            raise UnsuitedError("would take names of its tokens in the declarations for tokens")
        check_declares(render, native, tools)
        probe = probe_tools(partial(render, **native.arguments), native, tools)
        return ToolCallFormat(native, tools, probe, None)
    except UnsuitedError as error:
        reason = str(error)
    except (ConfigError, *TEMPLATE_FAILURES) as error:
        reason = f"fails when it is given tools ({error})"
    system = {"role": "system", "content": slot(SYSTEM_SLOT)}
    try:
        check_system_role(lambda dialogue: render([system, *dialogue]))
    except ConfigError as error:
        raise _refusal(reason, "has no system role to declare them in") from error
    try:
        probe = probe_tools(render, hermes, tools)
    except UnsuitedError as error:
        raise _refusal(reason, str(error)) from error
    return ToolCallFormat(hermes, tools, probe, reason)


def _refusal(native: str, hermes: str) -> ConfigError:
    return ConfigError(
        f"policy.reply is tool_call, but the chat template {native}, and {hermes}; wanted another "
        "policy.reply or another policy.chat_template"
    )


def _read_json(text: str) -> tuple[Any, str]:
    """Return the JSON value at the start of a text, within bounds, and the text after it."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
    if not text.startswith(("{", "[")):
        raise CallFaultError("the reply has no call")
    try:
        value, end = decoder.raw_decode(text)
        return as_json(value), text[end:].lstrip()
    except json.JSONDecodeError as error:
        raise CallFaultError(f"the call is no JSON: {error.msg}") from error
    except (ValueError, RecursionError, ValueFaultError) as error:
        raise CallFaultError(f"the JSON of the call holds {_BAD_VALUES}") from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
