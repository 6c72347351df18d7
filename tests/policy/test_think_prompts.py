"""Reply formats under chat templates that write a part of the reply themselves."""

import copy
from collections.abc import Callable

import pytest
from test_thinking import CHATML, TAGGED, byte_level
from transformers import PreTrainedTokenizerFast

from agentrl.errors import ConfigError
from agentrl.policy.chat import begun_reply, check_arguments
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.dialogue import ParsedReply
from agentrl.policy.reply_formats import REPLY_FORMATS
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import make_dialogue

# Earlier reasoning is dropped; what a reply with reasoning looks like is the template's own.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}\n</think>"
    "\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nBEGUN{% endif %}"
)
KEEPS = CHATML.replace("assistant\n{% endif %}", "assistant\nBEGUN{% endif %}")
# Reasoning is kept, but every turn is written anew.
COUNTS = KEEPS.replace("<|im_start|>{{ m.role }}\n", "<|im_start|>{{ m.role }} of {{ messages | length }}\n")
# The template opens the block of every reply, earlier ones as well.
OPENS_ALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}" + CLOSED + "{% endif %}"


@pytest.fixture(scope="module", params=["spelled", "added", "special"])
def chat(request: pytest.FixtureRequest) -> Callable[[str], PreTrainedTokenizerFast]:
    """Tokenizers without tokens for think tags, with them, and with ones that only a template may write."""
    made = byte_level(TAGGED, 320, ("<think>", "</think>") if request.param == "added" else ())
    if request.param == "special":
        made.add_tokens(["<think>", "</think>"], special_tokens=True)

    def with_template(template: str) -> PreTrainedTokenizerFast:
        changed = copy.deepcopy(made)
        changed.chat_template = template
        return changed

    return with_template


def read(dialogue: ChatDialogue, ids: tuple[int, ...]) -> str:
    return str(dialogue._tokenizer.decode(list(ids)))


def ids_of(dialogue: ChatDialogue, text: str, *, ended: bool = True) -> tuple[int, ...]:
    """Encode a reply as a policy may sample it."""
    ids = dialogue._tokenizer(text, add_special_tokens=False)["input_ids"]
    return (*ids, dialogue.encode_reply("x")[-1]) if ended else tuple(ids)


@pytest.mark.parametrize(
    ("template", "reply", "prompted", "wanted"),
    [
        (KEEPS, "think_action", "", "<think></think><action>go</action>"),
        (KEEPS, "think_action", OPEN, "</think><action>go</action>"),
        (KEEPS, "think_action", CLOSED, "<action>go</action>"),
        (DROPS, "think_action", "", "<think>\n\n</think>\n\n<action>go</action>"),
        (DROPS, "think_action", OPEN, "\n</think>\n\n<action>go</action>"),
        (DROPS, "think_action", "</think>", "<action>go</action>"),  # no opening tag at all
        (DROPS, "think_action", CLOSED, "<action>go</action>"),
        (DROPS, "action_tags", "", "<action>go</action>"),
        (DROPS, "action_tags", OPEN, "\n</think>\n\n<action>go</action>"),
        (DROPS, "action_tags", CLOSED, "<action>go</action>"),
        (DROPS, "plain", "", "go"),
        (DROPS, "plain", OPEN, "\n</think>\n\ngo"),
        (DROPS, "plain", CLOSED, "go"),
    ],
)
def test_an_experts_reply_goes_on_from_what_the_prompt_has_written(
    chat, template: str, reply: str, prompted: str, wanted: str
) -> None:
    dialogue = ChatDialogue(chat(template.replace("BEGUN", prompted)), reply=reply)
    prompt, ids = dialogue.prompt((), "room"), dialogue.encode_reply("go")
    assert read(dialogue, prompt.ids).endswith("assistant\n" + prompted)
    assert read(dialogue, ids) == wanted + "<|im_end|>"
    assert dialogue.parse(ids) == ParsedReply("go", valid=True)
    assert (dialogue.thinking is None) == (reply != "think_action" or "</think>" in prompted)
    # With its thoughts left out, a reply that thinks first says the same.
    if dialogue.thinking is not None:
        thinking = dialogue.thinking
        spelled = (*thinking.opening, *thinking.cut, *dialogue.encode_choice("go"))
        assert read(dialogue, (*prompt.ids, *spelled)).count("<think>") == 1 + (
            "<think>" in dialogue.instructions
        )
        assert dialogue.parse(spelled) == ParsedReply("go", valid=True)


@pytest.mark.parametrize(
    "template", [DROPS, KEEPS, COUNTS, OPENS_ALL], ids=["drops", "keeps", "counts", "opens-all"]
)
@pytest.mark.parametrize("prompted", ["", OPEN])
def test_no_think_tag_of_an_earlier_reply_stands_alone(chat, template: str, prompted: str) -> None:
    if template == OPENS_ALL:
        prompted = OPEN
    dialogue = ChatDialogue(chat(template.replace("BEGUN", prompted)), reply="think_action", instructions="")
    own = "" if prompted else "<think>"
    replies = [
        f"{own}the mug?\n</think>\n\n<action>go</action>",
        f"{own}or the pen\n</think><action>up</action>",
    ]
    history, held = [], ""
    for turn, text in enumerate(replies):
        prompt, ids = dialogue.prompt(history, f"room {turn}"), ids_of(dialogue, text)
        assert dialogue.parse(ids).valid
        held = ("" if prompt.new_sequence else held) + read(dialogue, (*prompt.ids, *ids))
        history.append((f"room {turn}", ids))
    prompt = dialogue.prompt(history, "room 2")
    held = ("" if prompt.new_sequence else held) + read(dialogue, prompt.ids)
    earlier = held.partition("room 0")[2].partition("room 2")[0]
    assert earlier.count("<think>") == earlier.count("</think>") == (0 if template == DROPS else 2)
    assert ("the mug?" in earlier) == (template != DROPS)
    assert dialogue.appends == (template in (KEEPS, OPENS_ALL))


def test_what_is_appended_is_what_a_template_would_render_that_is_given_the_block_back(chat) -> None:
    tokenizer = chat(KEEPS.replace("BEGUN", OPEN))
    dialogue = ChatDialogue(tokenizer, reply="think_action", instructions="")
    assert dialogue.appends
    reply = ids_of(dialogue, "why\n</think><action>go</action>")
    first, second = dialogue.prompt((), "a"), dialogue.prompt((("a", reply),), "b")
    written = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nwhy\n</think><action>go</action>"},
        {"role": "user", "content": "b"},
    ]
    rendered = tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=True)
    assert read(dialogue, (*first.ids, *reply, *second.ids)) == rendered


@pytest.mark.parametrize(
    ("reply", "text", "parsed"),
    [
        ("plain", "it is here\n</think>\n\ngo", ParsedReply("go", valid=True)),
        ("plain", "go", ParsedReply("go", valid=False)),  # it was still thinking
        ("plain", "hm</think> ", ParsedReply("hm</think>", valid=False)),
        (
            "action_tags",
            "<action>a</action>?\n</think>\n\n<action>go</action>",
            ParsedReply("go", valid=True),
        ),
        ("action_tags", "<action>go</action>", ParsedReply("go", valid=True)),
        ("think_action", "hm</think> <action>go</action>", ParsedReply("go", valid=True)),
        ("think_action", "<action>go</action>", ParsedReply("<action>go</action>", valid=False)),
    ],
)
def test_a_reply_in_a_block_that_the_prompt_opened_is_read_behind_it(chat, reply, text, parsed) -> None:
    dialogue = ChatDialogue(chat(DROPS.replace("BEGUN", OPEN)), reply=reply)
    assert dialogue.parse(ids_of(dialogue, text)) == parsed


def test_after_a_block_that_the_prompt_closed_nobody_is_asked_for_reasoning(chat) -> None:
    dialogue = ChatDialogue(chat(DROPS.replace("BEGUN", CLOSED)), reply="think_action")
    assert REPLY_FORMATS["action_tags"].instructions in read(dialogue, dialogue.prompt((), "room").ids)
    assert not dialogue.parse(ids_of(dialogue, "<think></think><action>go</action>")).valid
    assert not dialogue.parse(ids_of(dialogue, "well <action>go</action>")).valid


def test_a_lead_goes_on_from_what_the_closing_token_says_beyond_the_tag(chat) -> None:
    dialogue = ChatDialogue(chat(KEEPS.replace("BEGUN", OPEN)), reply="think_action")
    thinking = dialogue.thinking
    assert thinking is not None
    assert set(thinking.leads) == {""} | {
        beyond for beyond in thinking.ending.overhangs if beyond in ("<", "\n\n")
    }
    for beyond, lead in thinking.leads.items():
        assert beyond + read(dialogue, lead) in ("<action>", "\n\n<action>")
    if not thinking.ending.pieces.keys() & dialogue._tokenizer.added_tokens_decoder.keys():
        assert "<" in thinking.leads  # "><" is one token where "</think><action>" was read often


def test_a_prompt_is_searched_for_its_last_think_tags() -> None:
    def prompt(after: str) -> str:
        return begun_reply(lambda dialogue: f"<think> {dialogue[0]['content']}{after}")

    assert prompt("> bot: ") == ""
    assert prompt("> bot: <think>\n") == "<think>\n"
    assert prompt("> bot: <think>\n\n</think>\n\n") == "<think>\n\n</think>\n\n"
    assert prompt("> bot: </think>") == "</think>"
    assert prompt("> <think>a</think> bot: <think>") == "<think>"


# A template's own arguments.


def test_an_argument_is_given_to_the_template_whenever_it_is_rendered(chat) -> None:
    tokenizer = chat(DROPS.replace("BEGUN", SWITCH))
    loud = ChatDialogue(tokenizer, reply="think_action")
    quiet = make_dialogue(tokenizer, reply="think_action", template_arguments={"enable_thinking": False})
    assert isinstance(quiet, ChatDialogue)
    assert not loud.appends
    for history in ((), (("a", ids_of(loud, "<action>go</action>")),)):
        assert read(loud, loud.prompt(history, "b").ids).endswith("assistant\n")
        assert read(quiet, quiet.prompt(history, "b").ids).endswith("assistant\n" + CLOSED)
    assert read(loud, loud.encode_reply("go")).startswith(CLOSED)
    assert read(quiet, quiet.encode_reply("go")) == "<action>go</action><|im_end|>"


@pytest.mark.parametrize("value", [3, 0.5, "deep", ["a", "b"], {"depth": 2}, None])
def test_an_argument_is_any_plain_value(chat, value: object) -> None:
    tokenizer = chat("{{ effort }}|" + CHATML)
    dialogue = ChatDialogue(tokenizer, instructions="", template_arguments={"effort": value})
    assert read(dialogue, dialogue.prompt((), "x").ids).startswith(f"{value}|")


def test_an_argument_that_the_template_never_reads_is_refused_with_those_it_does(chat) -> None:
    tokenizer = chat(
        "{% set deep = effort or 1 %}" + CHATML.replace("{{ m.content }}", "{{ m.content }}{{ bos_token }}")
    )
    with pytest.raises(
        ConfigError, match=r"template_arguments\.enable_thinking: .*never reads it \(it reads effort\)"
    ):
        ChatDialogue(tokenizer, template_arguments={"effort": 1, "enable_thinking": False})


def test_names_in_a_template_count_as_read_only_from_outside() -> None:
    template = (
        "{% macro wrap(text, tools) %}{{ text }}{{ suffix }}{% endmacro %}"
        "{% generation %}{{ range(2) }}{% endgeneration %}"
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{{ wrap(messages[0], 1) }}"
        "{% for m in messages %}{% if not m %}{% continue %}{% endif %}{{ strftime_now('%d') }}{% endfor %}"
    )
    check_arguments(template, {"enable_thinking": False, "suffix": "."})
    for name in ("tools", "text", "m", "loop", "range", "messages", "strftime_now", "wrap"):
        with pytest.raises(ConfigError, match=r"\(it reads enable_thinking, suffix\)"):
            check_arguments(template, {name: 1})
    with pytest.raises(ConfigError, match="it reads no such argument"):
        check_arguments(CHATML, {"effort": 1})


@pytest.mark.parametrize(
    "name", ["messages", "conversation", "add_generation_prompt", "tokenize", "chat_template", "return_dict"]
)
def test_what_is_set_here_is_no_argument(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.template_arguments\.{name} is set by agentrl"):
        PolicyConfig(template_arguments={name: True})


def test_without_a_template_there_is_nothing_to_give_an_argument_to(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ConfigError, match=r"policy\.template_arguments is .*no chat template"):
        make_dialogue(tokenizer, template_arguments={"enable_thinking": False})
