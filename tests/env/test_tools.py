"""Tools that environments declare: what a declaration may say, and calls as actions and back."""

from typing import Any

import pytest
from text_worlds import Corridor

from agentrl.env import check_text_env
from agentrl.env.briefing import briefing_fault
from agentrl.env.tools import CallFaultError, act_tool, action_of, call_of, read_tool, read_tools
from agentrl.values import ValueFaultError

TEXT = {"type": "string"}


def declared(action: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"name": "do", "description": "Does it.", "parameters": schema, "action": action}


TAKE = read_tool(declared("take {count} {thing}", thing=TEXT, count={"type": "integer", "enum": [1, 2]}))


def test_a_call_becomes_an_action_and_an_action_its_call() -> None:
    assert TAKE.action_of({"thing": "mugs {thing}", "count": 2}) == "take 2 mugs {thing}"
    assert TAKE.arguments_of("take 2 mugs {thing}") == {"thing": "mugs {thing}", "count": 2}
    for other in ("take two mugs", "take 3 mugs", "take 02 mugs", "go", "take 2"):
        assert TAKE.arguments_of(other) is None
    assert call_of([TAKE, act_tool()], "go") == (act_tool(), {"command": "go"})


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"thing": "mug"}, "argument count of do is missing"),
        ({"thing": "mug", "count": 1, "secret": 5}, "unknown argument of do, wanted thing, count"),
        ({"thing": "mug", "count": "1"}, "argument count of do has another type, wanted integer"),
        ({"thing": "mug", "count": True}, "argument count of do has another type, wanted integer"),
        ({"thing": ["mug"], "count": 1}, "argument thing of do has another type, wanted string"),
        ({"thing": "mug", "count": 7}, "argument count of do has another value, wanted one of 1, 2"),
        ("mug", "the arguments of do are no object"),
    ],
)
def test_wrong_arguments_are_named_without_words_of_the_policy(arguments: Any, fault: str) -> None:
    with pytest.raises(CallFaultError) as found:
        action_of([TAKE], "do", arguments)
    assert str(found.value) == fault


def test_an_unknown_tool_is_a_fault_that_names_the_known_ones() -> None:
    for name in ("secret", None, 3, ["do"]):
        with pytest.raises(CallFaultError, match=r"^unknown tool, wanted do or act$"):
            action_of([TAKE, act_tool()], name, {})


@pytest.mark.parametrize(
    ("tools", "fault"),
    [
        ("search", "action_tools is 'search' .*, wanted a list of mappings"),
        ([{"name": "do"}], r"action_tools\[0\] is .*, wanted a mapping with name, description, parameters"),
        ([declared("go") | {"strict": True}], r"action_tools\[0\] is .*, wanted a mapping with"),
        ([declared("go") | {"name": "a b"}], r"\[0\]\.name is 'a b', wanted letters, digits"),
        ([declared("go {x}")], r"\[0\]\.action is 'go \{x\}', wanted no braces"),
        ([declared("go {x} {x}", x=TEXT)], r"wanted each of x once, in braces"),
        ([declared("go {x!r}", x=TEXT)], r"wanted each of x once, in braces"),
        ([declared("go {x", x=TEXT)], r"\.action is 'go \{x': expected '\}'"),
        ([declared("go {x}", x={})], r"\.parameters\.x: wanted a type, one of string, integer"),
        ([declared("go {x}", x={"type": "string", "enum": "ab"})], r"\.x\.enum: wanted a list"),
        (
            [declared("go") | {"parameters": {"type": "object", "properties": {}, "required": ["x"]}}],
            "required",
        ),
        ([declared("go"), declared("stay")], "action_tools names a tool twice: do, do"),
        ([declared("go") | {"description": 3}], r"\[0\] is 3 \(int\), wanted a str"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_place(tools: Any, fault: str) -> None:
    with pytest.raises(ValueFaultError, match=fault):
        read_tools(tools)


def test_the_contract_covers_the_declarations_the_offered_actions_and_the_expert() -> None:
    def faults(*tools: Any) -> dict[str, str]:
        class Declaring(Corridor):
            action_tools = tools

        assert (briefing_fault(Declaring) is None) == (tools[0] is not None)
        return {check.name: check.detail for check in check_text_env(Declaring).failed}

    assert faults(declared("{x}", x=TEXT)) == {}
    assert faults(None)["interface"].startswith("action_tools[0] is None")
    found = faults(declared("fly"))
    assert found.keys() == {"admissible actions", "expert"}
    assert all("is no call of a tool in action_tools" in detail for detail in found.values())
