"""Replies that are tool calls: in the form of each family of chat templates, and what is no valid call."""

import json
import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from tool_templates import CHATML, FAMILIES, HERMES, LLAMA, MISTRAL, chat_tokenizer

from agentrl.env import make
from agentrl.env.briefing import Briefing, read_briefing
from agentrl.env.tools import Tool, act_tool, call_of, read_tool
from agentrl.errors import ConfigError
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.prompt import Observation, load_prompt
from agentrl.policy.tokens import make_dialogue

SEARCH = read_tool(
    {
        "name": "search",
        "description": 'Search "everything".',
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        "action": "search[{query}]",
    }
)
COUNT = read_tool(
    {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"thing": {"type": "string"}, "most": {"type": "integer"}},
        },
        "action": "count {most} {thing}",
    }
)
LOOK = read_tool({"name": "look", "action": "look around"})
TOOLS = (SEARCH, COUNT, LOOK)
ACTIONS = ('search[a "red" {mug}]', "look around", "count 12 mugs\nand cups")
OBSERVATIONS = ("Search for a mug.", 'Nothing "here".\nNor there.', "You see: a mug.", "Two cups.")
NASTY = (
    *('"', "\\", "{", "}", "[", "]", "'", "\n", "\t", "\r", "\x00", "\u2028", "ß", "🥚", " ", "</tool_call>"),
    *(
        "<tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "{}",
        "a",
    ),
    *('{"name": "act"}', "{command}", "\\u0022", "Argument0Placeholder", '"Argument0Placeholder"', "null"),
)


def dialogue_of(template: str, tools: tuple[Tool, ...] = TOOLS, **arguments: Any) -> ChatDialogue:
    dialogue = ChatDialogue(chat_tokenizer(template), reply="tool_call", **arguments)
    return dialogue.for_episode(Briefing(tools=tools))


def squeezed(text: str) -> str:
    """The fitted tokenizer writes a space before every piece, which is no part of the text."""
    return "".join(text.split())


def held(dialogue: ChatDialogue, actions: tuple[str, ...]) -> list[int]:
    ids: list[int] = []
    history: list[tuple[str, tuple[int, ...]]] = []
    for observation, action in zip(OBSERVATIONS, (*actions, None), strict=False):
        prompt = dialogue.prompt(history, observation)
        assert prompt.new_sequence == (not history)
        reply = () if action is None else dialogue.encode_reply(action)
        ids += [*prompt.ids, *reply]
        history.append((observation, reply))
    return ids


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tokens", [True, False])
def test_any_text_in_an_argument_comes_back(family: str, tokens: bool) -> None:
    tokenizer = chat_tokenizer(FAMILIES[family], tokens=tokens)
    draw = Random(f"{family} {tokens}")
    texts = [*NASTY, *("".join(draw.choices(NASTY, k=draw.randint(2, 9))) for _ in range(60))]
    act = ChatDialogue(tokenizer, reply="tool_call")
    search = act.for_episode(Briefing(tools=TOOLS))
    for text in texts:
        for dialogue, action in ((act, text), (search, f"search[{text}]"), (search, f"count -3 {text}")):
            parsed = dialogue.parse(dialogue.encode_reply(action))
            assert (parsed.text, parsed.valid) == (action, True)


def played(env_id: str, **kwargs: Any) -> Iterator[tuple[Briefing, list[str]]]:
    """The actions that an environment offers, and those of its expert, on the way of the expert."""
    env = make(env_id, expert=True, **kwargs)
    for task in list(env.unwrapped.tasks("train")[:2]):
        _, info = env.reset(seed=0, options={"task": task})
        briefing = read_briefing(env, info)
        for _ in range(6):
            if info["expert"] is None:
                break
            yield briefing, [info["expert"], *info.get("actions", ())]
            _, _, terminated, truncated, info = env.step(info["expert"])
            if terminated or truncated:
                break
    env.close()


@pytest.mark.parametrize(
    ("env_id", "kwargs", "names"),
    [
        ("agentrl/MathTools-v0", {"tools": "calculator"}, ["calculator", "answer"]),
        ("agentrl/MathTools-v0", {"tools": ["python"], "require_isolation": False}, ["python", "answer"]),
        ("agentrl/WebShop-v0", {"products": 60}, ["search", "click"]),
        ("agentrl/ALFWorld-v0", {"max_receptacles": 4}, []),
        ("agentrl/Reasoning-v0", {}, []),
    ],
)
def test_every_action_of_our_environments_is_a_call_and_comes_back(
    env_id: str, kwargs: dict[str, Any], names: list[str]
) -> None:
    dialogues = [ChatDialogue(chat_tokenizer(each), reply="tool_call") for each in FAMILIES.values()]
    seen = 0
    for briefing, actions in played(env_id, **kwargs):
        assert [tool.name for tool in briefing.tools] == names
        for dialogue in (each.for_episode(briefing) for each in dialogues):
            assert dialogue.unsaid(actions) is None
            for action in actions:
                assert dialogue.parse(dialogue.encode_reply(action)).text == action
                seen += 1
    assert seen >= 10


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"none", "mistral-args"}))
def test_a_growing_dialogue_is_what_the_template_writes_of_calls_and_results(family: str) -> None:
    dialogue, tokenizer = (
        dialogue_of(FAMILIES[family], instructions="Go on."),
        chat_tokenizer(FAMILIES[family]),
    )
    written: list[dict[str, Any]] = [{"role": "user", "content": f"Go on.\n\n{OBSERVATIONS[0]}"}]
    for action, result in zip(ACTIONS, OBSERVATIONS[1:], strict=True):
        found = call_of(TOOLS, action)
        assert found is not None
        function = {"name": found[0].name, "arguments": found[1]}
        written += [
            {"role": "assistant", "content": "", "tool_calls": [{"id": "0" * 9, "function": function}]},
            {"role": "tool", "name": found[0].name, "tool_call_id": "0" * 9, "content": result},
        ]
    declared = [tool.declaration for tool in TOOLS]
    rendered = tokenizer.apply_chat_template(
        written, tools=declared, tokenize=False, add_generation_prompt=True
    )
    assert squeezed(tokenizer.decode(held(dialogue, ACTIONS))) == squeezed(rendered)


def test_the_name_of_a_result_is_that_of_the_last_call() -> None:
    template = HERMES.replace("<tool_response>\n", "<tool_response>{{ m.name }}: ")
    tokenizer, dialogue = chat_tokenizer(template), dialogue_of(template)
    text = tokenizer.decode(held(dialogue, ACTIONS))
    assert [piece.split(":")[0].strip() for piece in text.split("<tool_response>")[1:]] == [
        "search",
        "look",
        "count",
    ]


def test_a_template_that_ignores_tools_declares_them_in_the_system_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        dialogue = dialogue_of(CHATML, system_message="You are brief.")
        dialogue.for_episode(Briefing(tools=(SEARCH,)))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("policy.reply=tool_call: the chat template ignores tools; they are declared in")
    text = chat_tokenizer(CHATML).decode(held(dialogue, ACTIONS))
    system, _, rest = text.partition("<|im_end|>")
    assert system.startswith("<|im_start|> system\nYou are brief.\n\n# Tools")
    assert all(json.dumps(tool.declaration) in system for tool in TOOLS)
    call = '<tool_call> {"name": "count", "arguments": {"thing": "mugs\\nand cups", "most": 12}} </tool_call>'
    assert squeezed(call) in squeezed(rest)
    assert squeezed("<tool_response>You see: a mug.</tool_response>") in squeezed(rest)


def test_a_template_that_can_write_tools_nowhere_is_refused() -> None:
    refusing = CHATML.replace(
        "{% for m",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m",
    )
    with pytest.raises(
        ConfigError, match="the chat template ignores tools, and has no system role to declare"
    ):
        dialogue_of(refusing)
    numbered = CHATML.replace("{{ m.role }}", "{{ m.role }} of {{ messages | length }}")
    with pytest.raises(
        ConfigError, match="and changes the first message when a call follows; wanted another"
    ):
        dialogue_of(numbered)


def test_tools_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"policy\.reply is 'tool_call', but the tokenizer has no chat template"
    ):
        make_dialogue(tokenizer, reply="tool_call")


def test_declarations_that_spell_markup_are_never_the_template_s_own_text() -> None:
    spelling = read_tool({"name": "go", "description": "Go.<|im_end|>", "action": "go"})
    dialogue, tokenizer = dialogue_of(HERMES, (spelling,)), chat_tokenizer(HERMES)
    ids = dialogue.prompt([], "x").ids
    assert "Go.<|im_end|>" in tokenizer.decode(ids)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # of the system and the user


@pytest.mark.parametrize(("template", "tag"), [(HERMES, "<tool_call>"), (MISTRAL, "[TOOL_CALLS]")])
def test_the_tag_of_a_call_is_a_token_and_that_in_an_argument_is_text(template: str, tag: str) -> None:
    dialogue, token = dialogue_of(template), chat_tokenizer(template).convert_tokens_to_ids(tag)
    assert dialogue.encode_reply(f"search[{tag}]").count(token) == 1


def hermes(*calls: Any, before: str = "", after: str = "") -> str:
    written = (call if isinstance(call, str) else json.dumps(call) for call in calls)
    return before + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written) + after


def call(name: Any = "search", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


MUG = call(query="mug")
TOO_MUCH = "the JSON of the call holds a key twice, no valid text or number, or too many or too deeply nested"
INVALID = {
    "search[mug]": "the reply has no call",
    "": "the reply has no call",
    "<think>" + hermes(MUG): "the reply has no call",
    hermes("mug"): "the reply has no call",
    hermes("{'name': 'search'}"): "the call is no JSON: Expecting property name enclosed in double quotes",
    hermes('{"name": "search", "arguments": {"query": "a\nb"}}'): "the call is no JSON: Invalid control",
    hermes(MUG).removesuffix("</tool_call>"): "the call does not end in </tool_call>",
    hermes(MUG, MUG): "more than one call",
    hermes(MUG, after=" Done."): "text after the call",
    hermes([MUG]): "the call is no object",
    hermes(call("fly", query="mug")): "unknown tool, wanted search or count or look",
    hermes(call(["search"])): "unknown tool, wanted",
    hermes({"arguments": {}}): "the call has no name",
    hermes({"name": "search"}): "the call has no arguments",
    hermes(MUG | {"then": MUG}): "the call has keys beside its name and its arguments",
    hermes({"name": "search", "arguments": '{"query": "mug"}'}): "the arguments of search are no object",
    hermes(call()): "argument query of search is missing",
    hermes(call(query="mug", most=1)): "unknown argument of search, wanted query",
    hermes(call(query=None)): "argument query of search has another type, wanted string",
    hermes(call("count", thing="mug", most=1.5)): "argument most of count has another type, wanted integer",
    hermes('{"name": "search", "name": "count", "arguments": {}}'): TOO_MUCH,
    hermes('{"name": "count", "arguments": {"thing": "a", "most": NaN}}'): TOO_MUCH,
    hermes('{"name": "count", "arguments": {"thing": "a", "most": 1e999}}'): TOO_MUCH,
    hermes(f'{{"name": "count", "arguments": {{"thing": "a", "most": {"7" * 5000}}}}}'): TOO_MUCH,
    hermes('{"name": "search", "arguments": {"query": "\\ud800"}}'): TOO_MUCH,
    hermes('{"a": ' * 20 + "1" + "}" * 20): TOO_MUCH,
    hermes("[" * 100_000): TOO_MUCH,
    hermes("[" + "1," * 20_000 + "1]"): TOO_MUCH,
    hermes(call(query="x" * 1_000_000)): "the reply is too long",
}


@pytest.mark.parametrize(("reply", "fault"), INVALID.items(), ids=range(len(INVALID)))
def test_what_is_no_valid_call_is_an_invalid_turn_that_says_why(reply: str, fault: str) -> None:
    dialogue = dialogue_of(HERMES)
    calls = dialogue._calls
    assert calls is not None
    found = calls.read(reply.strip(), True)
    assert not found.valid
    assert found.text.startswith(f"invalid tool call: {fault}")


@pytest.mark.parametrize(
    "reply",
    [
        hermes(MUG),
        hermes(MUG, before="I look for it. "),
        hermes(MUG, before=f"<think>Or {hermes(call('look'))}?</think>\n\n"),
        '<tool_call>{"arguments":{"query":"mug"},"name":"search"}</tool_call>',
        hermes({"name": "search", "parameters": {"query": "mug"}, "id": "x", "type": "function"}),
    ],
)
def test_a_call_may_have_other_white_space_order_and_text_before_it(reply: str) -> None:
    calls = dialogue_of(HERMES)._calls
    assert calls is not None
    assert calls.read(reply, True).text == "search[mug]"


@pytest.mark.parametrize(
    ("template", "reply", "text"),
    [
        (LLAMA, '<|python_tag|>{"name": "search", "parameters": {"query": "mug"}}', "search[mug]"),
        (
            LLAMA,
            'Now {"name": "search", "parameters": {"query": "mug"}}',
            "invalid tool call: the reply has no call",
        ),
        (LLAMA, f"{json.dumps(MUG)}; {json.dumps(MUG)}", "invalid tool call: more than one call"),
        (MISTRAL, f"[TOOL_CALLS] [{json.dumps(MUG)}]", "search[mug]"),
        (
            MISTRAL,
            f"[TOOL_CALLS] [{json.dumps(MUG)}, {json.dumps(MUG)}]",
            "invalid tool call: more than one call",
        ),
        (MISTRAL, f"[TOOL_CALLS] {json.dumps(MUG)}", "invalid tool call: the call is not in a list"),
        (MISTRAL, "[TOOL_CALLS] []", "invalid tool call: the call is not in a list"),
        (FAMILIES["mistral-args"], '[TOOL_CALLS]search[ARGS]{"query": "mug"}', "search[mug]"),
        (
            FAMILIES["mistral-args"],
            '[TOOL_CALLS]look[ARGS]{"query": "mug"}',
            "invalid tool call: unknown argument",
        ),
        (FAMILIES["mistral-args"], "[TOOL_CALLS]search", "invalid tool call: the reply has no call"),
    ],
)
def test_each_family_reads_its_own_form(template: str, reply: str, text: str) -> None:
    calls = dialogue_of(template)._calls
    assert calls is not None
    found = calls.read(reply, True)
    assert (found.text[: len(text)], found.valid) == (text, not text.startswith("invalid"))


def test_an_environment_without_tools_gets_one_for_its_commands() -> None:
    dialogue = ChatDialogue(chat_tokenizer(HERMES), reply="tool_call")
    assert dialogue.tools == (act_tool(),)
    told = dialogue.for_episode(Briefing(instructions="Walk on."))
    assert told.tools == (act_tool("Walk on."),)
    assert told is dialogue.for_episode(Briefing(instructions="Walk on."))
    assert ChatDialogue(chat_tokenizer(HERMES)).for_episode(Briefing(tools=TOOLS)).tools is None


def test_an_action_that_no_tool_calls_is_written_as_it_is_and_named() -> None:
    dialogue = dialogue_of(HERMES)
    assert dialogue.unsaid(["look around", "look", "fly"]) == "look"
    assert not dialogue.parse(dialogue.encode_reply("look")).valid


def test_a_prompt_of_its_own_shows_actions_and_calls() -> None:
    source = load_prompt("literature", 2)
    dialogue = dialogue_of(HERMES, prompt=source)
    tokenizer = chat_tokenizer(HERMES)
    briefing = Briefing("find it", tools=TOOLS)
    history = [(Observation("One.", None, briefing), dialogue.encode_reply("look around"))]
    prompt = dialogue.prompt(history, Observation("Two.", None, briefing))
    text = tokenizer.decode(prompt.ids)
    assert prompt.new_sequence
    assert all(said in text for said in ("look around", "Two.", "call one of your tools", '"name": "count"'))


def test_a_think_block_that_the_prompt_opens_is_closed_before_a_call() -> None:
    template = HERMES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    dialogue = dialogue_of(template)
    reply = dialogue.encode_reply("look around")
    assert dialogue.parse(reply).text == "look around"
    assert squeezed(chat_tokenizer(template).decode(reply)).startswith("</think><tool_call>")


@pytest.mark.parametrize("template", [HERMES, LLAMA, CHATML])
@pytest.mark.parametrize("prompt", [None, load_prompt("react")])
def test_the_result_of_an_invalid_call_begins_with_what_was_wrong(template: str, prompt: Any) -> None:
    dialogue, tokenizer = dialogue_of(template, prompt=prompt), chat_tokenizer(template)
    history = [("One.", dialogue.encode_reply("fly"))]
    text = tokenizer.decode(dialogue.prompt(history, "Two.").ids)
    newline = "\\n" if template == LLAMA else "\n"
    observed = "Two." if prompt is None else "Observation 2: Two."
    assert squeezed(f"invalid tool call: the reply has no call{newline}{observed}") in squeezed(text)
    history = [("One.", dialogue.encode_reply("look around"))]
    assert "invalid" not in tokenizer.decode(dialogue.prompt(history, "Two.").ids)
