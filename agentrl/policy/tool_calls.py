"""Tool calls in the form of a chat template: declarations, calls, results, and the call in a reply."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    Message,
    begun_reply,
    check_system_role,
    messages,
    rendered,
    slot,
    text_around,
)
from agentrl.policy.dialogue import ParsedReply
from agentrl.policy.prompt import ReplyWords
from agentrl.policy.reply_formats import TASK
from agentrl.values import MAX_TEXT_CHARS, ValueFaultError, as_json

_EMPTY_BLOCK = re.compile(rf"^\s*{THINK}\s*{END_THINK}\s*")
INVALID = "invalid tool call: "  # begins the action of a reply without a valid call
_CALL_ID = "000000000"  # nine digits, as Mistral's templates want
_PYTHON_TAG = "<|python_tag|>"  # Llama 3 may write it before a call
_BAD_VALUES = "a key twice, no valid text or number, or too many or too deeply nested values"
_ASKS = "call one of your tools."
_HERMES = """# Tools

These functions are at your disposal, one per line:
<tools>
{}
</tools>

Each reply calls one of them, as a JSON object with its name and its arguments:
<tool_call>
{{"name": "the function", "arguments": {{"the argument": "its value"}}}}
</tool_call>"""

Render = Callable[..., str]
Parts = tuple[str, str, str]  # the text before, in and after the JSON of a call


class _UnsuitedError(Exception):
    """Raised for a chat template that does not write tools; the message says what it does instead."""


@dataclass(frozen=True, slots=True)
class _Style:
    """Way of telling a chat template of tools: as its own arguments and messages, or as text.

    Args:
        call: Makes the message of a call, of a tool and its arguments.
        result: Makes the message of a result, of a tool and a text.
        arguments: Arguments of the template.
        system: Text of the system message.
    """

    call: Callable[[Tool, Mapping[str, Any]], Message]
    result: Callable[[Tool, str], Message]
    arguments: Mapping[str, Any]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class _Shape:
    """Form of the JSON of a call.

    Args:
        listed: Whether the call is the only item of a list.
        name: The key of the function's name; None where the name stands before the JSON.
        arguments: The key of the arguments; None where they are all of the JSON.
    """

    listed: bool
    name: str | None
    arguments: str | None


@dataclass(frozen=True, slots=True)
class _CallText:
    """Text of the calls of a tool: `json` are the texts around its arguments `names`."""

    before: str
    json: tuple[str, ...]
    names: tuple[str, ...]
    after: str

    def write(self, arguments: Mapping[str, Any]) -> Parts:
        """Return the text of a call in three parts."""
        values = [json.dumps(arguments[name], ensure_ascii=False) for name in self.names]
        text = "".join(map("".join, zip(self.json, [*values, ""], strict=True)))
        return self.before, text, self.after


@dataclass(frozen=True, slots=True)
class _Probe:
    """What rendering showed of a template: the text around turns and in calls."""

    pieces: ChatPieces
    texts: Mapping[str, _CallText]
    betweens: Mapping[str, str]  # the text between a call and its result, by tool
    shape: _Shape
    escapes: bool


class ToolCallFormat:
    """Format of replies that are calls of an environment's tools, in the form of a chat template.

    Args:
        style: How the template is told of the tools.
        tools: The tools.
        probe: What rendering showed.

    Attributes:
        reason: Why the declarations stand in the system message; None where the template writes them.
        arguments: The arguments with which the template writes them.
    """

    thinks = False

    def __init__(self, style: _Style, tools: Sequence[Tool], probe: _Probe, reason: str | None) -> None:
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

    def probe(self, render: Render, instructions: str) -> ChatPieces:
        """Find the fixed text around a turn; see `agentrl.policy.chat.probe_template`."""
        return _probe(render, self._style, self._tools, instructions).pieces

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
    declared = [tool.declaration for tool in tools]
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in declared)
    native = _Style(_native_call, _native_result, {"tools": declared})
    try:
        if spells_markup(lines):
            raise _UnsuitedError("would take names of its tokens in the declarations for tokens")
        _check_declares(render, native, tools)
        probe = _probe(partial(render, **native.arguments), native, tools, "")
        return ToolCallFormat(native, tools, probe, None)
    except _UnsuitedError as error:
        reason = str(error)
    except (ConfigError, *TEMPLATE_FAILURES) as error:
        reason = f"fails when it is given tools ({error})"
    hermes = _Style(_hermes_call, _hermes_result, {}, _HERMES.format(lines))
    system = {"role": "system", "content": slot(SYSTEM_SLOT)}
    try:
        check_system_role(lambda dialogue: render([system, *dialogue]))
    except ConfigError as error:
        raise _refusal(reason, "has no system role to declare them in") from error
    try:
        probe = _probe(render, hermes, tools, "")
    except _UnsuitedError as error:
        raise _refusal(reason, str(error)) from error
    return ToolCallFormat(hermes, tools, probe, reason)


def _refusal(native: str, hermes: str) -> ConfigError:
    return ConfigError(
        f"policy.reply is tool_call, but the chat template {native}, and {hermes}; wanted another "
        "policy.reply or another policy.chat_template"
    )


def _native_call(tool: Tool, arguments: Mapping[str, Any]) -> Message:
    function = {"name": tool.name, "arguments": dict(arguments)}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _native_result(tool: Tool, text: str) -> Message:
    return {"role": "tool", "name": tool.name, "tool_call_id": _CALL_ID, "content": text}


def _hermes_call(tool: Tool, arguments: Mapping[str, Any]) -> Message:
    call = json.dumps({"name": tool.name, "arguments": dict(arguments)}, ensure_ascii=False)
    return {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"}


def _hermes_result(tool: Tool, text: str) -> Message:
    return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}


def _check_declares(render: Render, style: _Style, tools: Sequence[Tool]) -> None:
    first = messages([slot(0)], [], "")
    without, told = render(first), render(first, **style.arguments)
    if any(told.count(tool.name) <= without.count(tool.name) for tool in tools):
        raise _UnsuitedError("ignores tools")


def _probe(render: Render, style: _Style, tools: Sequence[Tool], instructions: str) -> _Probe:
    """Render placeholders, and find the text of calls and around turns.

    Raises:
        _UnsuitedError: The template does not write calls and results, or not as text that stays the same.
    """
    first = messages([slot(0)], [], instructions)
    opening, before_reply = text_around(rendered(render, first), slot(0))
    begun = begun_reply(render)
    header = before_reply.removesuffix(begun)
    reply = {"role": "assistant", "content": "ReplyPlaceholder"}
    end = render([*first, reply], add_generation_prompt=False).rpartition("ReplyPlaceholder")[2]
    texts, betweens, found = {}, {}, set()
    for tool in tools:
        arguments = {name: _hole(number) for number, name in enumerate(tool.properties)}
        call = style.call(tool, arguments)
        whole = render([*first, call, style.result(tool, slot(1))])
        head, turn, later = _split(whole, slot(0), slot(1))
        if head != opening or not turn.startswith(header):
            raise _UnsuitedError("changes the first message when a call follows")
        body = turn.removeprefix(header)
        start, stop, shape = _find_json(body, tool, arguments)
        finished = render([*first, call], add_generation_prompt=False).rpartition(body[start:stop])[2]
        after = finished.removesuffix(end)
        if not finished.endswith(end) or not body[stop:].startswith(after):
            raise _UnsuitedError("ends a call otherwise than a reply")
        pieces = re.split(r'"Argument\d+Placeholder"', body[start:stop])
        order = [int(number) for number in re.findall(r'"Argument(\d+)Placeholder"', body[start:stop])]
        # Where a template writes an empty think block, the prompt has it already, or it can be left out.
        lead, before = _split_lead(_EMPTY_BLOCK.sub("", body[:start]))
        names = tuple(arguments)
        if sorted(order) != [*range(len(names))] or (shape.name is None and before.count(tool.name) != 1):
            raise _UnsuitedError("writes calls in a form of its own")
        texts[tool.name] = _CallText(before, tuple(pieces), tuple(names[place] for place in order), after)
        betweens[tool.name] = body[stop:].removeprefix(after)
        around = before.replace(tool.name, "") if shape.name is None else before
        found.add((shape, lead, around, after, later))
    if len(found) > 1:
        raise _UnsuitedError("writes the calls of different tools differently")
    ((shape, lead, _, _, later),) = found
    twice = render([*first, call, style.result(tool, slot(1)), call, style.result(tool, slot(2))])
    if twice != whole.removesuffix(begun) + body + slot(2) + later:
        raise _UnsuitedError("writes earlier calls differently when others follow")
    between = betweens[tools[0].name]
    pieces_around = ChatPieces(opening, before_reply, lead, between, True, begun, before_later=later)
    quoted = render([*first, call, style.result(tool, f'{slot(1)}"Q')]).partition(slot(1))[2]
    if not quoted.startswith(('"Q', '\\"Q')):
        raise _UnsuitedError("changes the text of results")
    return _Probe(pieces_around, texts, betweens, shape, quoted.startswith("\\"))


def _split_lead(text: str) -> tuple[str, str]:
    """Split a text into the white space at its start and the rest."""
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


def _hole(number: int) -> str:
    return f"Argument{number}Placeholder"


def _split(text: str, first: str, second: str) -> tuple[str, str, str]:
    parts = re.split(f"({re.escape(first)}|{re.escape(second)})", text)
    if parts[1::2] != [first, second]:
        raise _UnsuitedError("does not write the results of calls")
    return parts[0], parts[2], parts[4]


def _find_json(text: str, tool: Tool, arguments: Mapping[str, str]) -> tuple[int, int, _Shape]:
    """Return where the JSON of a rendered call starts and stops, and its form."""
    for start, sign in enumerate(text):
        if sign in "{[":
            try:
                value, stop = json.JSONDecoder().raw_decode(text, start)
            except (ValueError, RecursionError):
                continue
            if (shape := _shape_of(value, tool.name, arguments)) is not None:
                return start, stop, shape
    raise _UnsuitedError("writes no calls, or not as JSON")


def _shape_of(value: Any, name: str, arguments: Mapping[str, str]) -> _Shape | None:
    listed = isinstance(value, list) and len(value) == 1
    call = value[0] if listed else value
    if not isinstance(call, dict):
        return None
    if call == arguments:
        return _Shape(listed, None, None)
    named = next((key for key, item in call.items() if item == name), None)
    given = next((key for key, item in call.items() if item == arguments), None)
    return None if named is None or given is None else _Shape(listed, named, given)


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
