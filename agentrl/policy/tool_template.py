"""Find the way in which a chat template writes tools, calls and results, by rendering placeholders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.env.tools import Tool
from agentrl.policy.chat import (
    END_THINK,
    THINK,
    ChatPieces,
    Message,
    begun_reply,
    messages,
    rendered,
    slot,
    text_around,
)

_EMPTY_BLOCK = re.compile(rf"^\s*{THINK}\s*{END_THINK}\s*")
_CALL_ID = "000000000"  # nine digits, as Mistral's templates want
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


class UnsuitedError(Exception):
    """Raised for a chat template that does not write tools; the message says what it does instead."""


@dataclass(frozen=True, slots=True)
class ToolStyle:
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
class CallShape:
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
class CallText:
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
class ToolPieces:
    """Text around turns and in calls, as a template renders it."""

    pieces: ChatPieces
    texts: Mapping[str, CallText]
    betweens: Mapping[str, str]  # the text between a call and its result, by tool
    shape: CallShape
    escapes: bool


def native_style(tools: Sequence[Tool]) -> ToolStyle:
    """Return the style in which the template itself writes tools."""
    return ToolStyle(_native_call, _native_result, {"tools": [tool.declaration for tool in tools]})


def hermes_style(tools: Sequence[Tool]) -> ToolStyle:
    """Return the style of Hermes, for a template that only writes what messages say."""
    lines = "\n".join(json.dumps(tool.declaration, ensure_ascii=False) for tool in tools)
    return ToolStyle(_hermes_call, _hermes_result, {}, _HERMES.format(lines))


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


def check_declares(render: Render, style: ToolStyle, tools: Sequence[Tool]) -> None:
    """Raise an `UnsuitedError` for a template that leaves out the names of tools."""
    first = messages([slot(0)], [], "")
    without, told = render(first), render(first, **style.arguments)
    if any(told.count(tool.name) <= without.count(tool.name) for tool in tools):
        raise UnsuitedError("ignores tools")


def probe_tools(render: Render, style: ToolStyle, tools: Sequence[Tool]) -> ToolPieces:
    """Render placeholders, and find the text of calls and around turns.

    Raises:
        UnsuitedError: The template does not write calls and results, or not as text that stays the same.
    """
    first = messages([slot(0)], [], "")
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
            raise UnsuitedError("changes the first message when a call follows")
        body = turn.removeprefix(header)
        start, stop, shape = _find_json(body, tool, arguments)
        finished = render([*first, call], add_generation_prompt=False).rpartition(body[start:stop])[2]
        after = finished.removesuffix(end)
        if not finished.endswith(end) or not body[stop:].startswith(after):
            raise UnsuitedError("ends a call otherwise than a reply")
        pieces = re.split(r'"Argument\d+Placeholder"', body[start:stop])
        order = [int(number) for number in re.findall(r'"Argument(\d+)Placeholder"', body[start:stop])]
        # Where a template writes an empty think block, the prompt has it already, or it can be left out.
        lead, before = _split_lead(_EMPTY_BLOCK.sub("", body[:start]))
        names = tuple(arguments)
        if sorted(order) != [*range(len(names))] or (shape.name is None and before.count(tool.name) != 1):
            raise UnsuitedError("writes calls in a form of its own")
        texts[tool.name] = CallText(before, tuple(pieces), tuple(names[place] for place in order), after)
        betweens[tool.name] = body[stop:].removeprefix(after)
        around = before.replace(tool.name, "") if shape.name is None else before
        found.add((shape, lead, around, after, later))
    if len(found) > 1:
        raise UnsuitedError("writes the calls of different tools differently")
    ((shape, lead, _, _, later),) = found
    twice = render([*first, call, style.result(tool, slot(1)), call, style.result(tool, slot(2))])
    if twice != whole.removesuffix(begun) + body + slot(2) + later:
        raise UnsuitedError("writes earlier calls differently when others follow")
    between = betweens[tools[0].name]
    pieces_around = ChatPieces(opening, before_reply, lead, between, True, begun, before_later=later)
    quoted = render([*first, call, style.result(tool, f'{slot(1)}"Q')]).partition(slot(1))[2]
    if not quoted.startswith(('"Q', '\\"Q')):
        raise UnsuitedError("changes the text of results")
    return ToolPieces(pieces_around, texts, betweens, shape, quoted.startswith("\\"))


def _split_lead(text: str) -> tuple[str, str]:
    """Split a text into the white space at its start and the rest."""
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


def _hole(number: int) -> str:
    return f"Argument{number}Placeholder"


def _split(text: str, first: str, second: str) -> tuple[str, str, str]:
    parts = re.split(f"({re.escape(first)}|{re.escape(second)})", text)
    if parts[1::2] != [first, second]:
        raise UnsuitedError("does not write the results of calls")
    return parts[0], parts[2], parts[4]


def _find_json(text: str, tool: Tool, arguments: Mapping[str, str]) -> tuple[int, int, CallShape]:
    """Return where the JSON of a rendered call starts and stops, and its form."""
    for start, sign in enumerate(text):
        if sign in "{[":
            try:
                value, stop = json.JSONDecoder().raw_decode(text, start)
            except (ValueError, RecursionError):
                continue
            if (shape := _shape_of(value, tool.name, arguments)) is not None:
                return start, stop, shape
    raise UnsuitedError("writes no calls, or not as JSON")


def _shape_of(value: Any, name: str, arguments: Mapping[str, str]) -> CallShape | None:
    listed = isinstance(value, list) and len(value) == 1
    call = value[0] if listed else value
    if not isinstance(call, dict):
        return None
    if call == arguments:
        return CallShape(listed, None, None)
    named = next((key for key, item in call.items() if item == name), None)
    given = next((key for key, item in call.items() if item == arguments), None)
    return None if named is None or given is None else CallShape(listed, named, given)
