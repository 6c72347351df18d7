"""Chat messages for a server say what a `ChatDialogue` with the server's template would have written."""

import random
from itertools import product

import pytest
from chat_models import chat_model
from tokenizers import pre_tokenizers

from agentrl.env.briefing import Briefing
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.message_dialogue import Exchange, MessageDialogue
from agentrl.policy.model import load_tokenizer
from agentrl.policy.prompt import Example, Observation, load_prompt

EXAMPLES = (Example("find a cup", (("a shelf", "look"), ("a cup", "take cup"))),)
REPLIES = ("plain", "action_tags", "think_action")
SAID = {
    "plain": ("go to desk 1", " take cd 1 ", "", "look\naround"),
    "action_tags": ("<action>go</action>", "so <action> look </action> .", "none", "<action></action>"),
    "think_action": (
        "<think>hm</think><action>go</action>",
        "<think>\n</think>\n\n<action>a</action>",
        "x",
        "",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    tokenizer = load_tokenizer(chat_model(tmp_path_factory.mktemp("chat")))
    # Decoded text is then the encoded one, as with the tokenizers of chat models.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def observations() -> list[Observation]:
    briefing = Briefing("put a cup on the desk", "Act.", {}, 12)
    said = ["You see a desk 1. put a cup on the desk", "On it: a cd 1.", "Nothing happens.", "You take it."]
    return [Observation(text, ("go to desk 1", "take cd 1"), briefing) for text in said]


@pytest.mark.parametrize(
    ("reply", "prompt", "history", "system"),
    [
        *product(REPLIES, ("plain", "literature", "react"), (None,), (None, "Be brief.")),
        *product(("plain",), ("plain", "literature", "react"), ("full", "none", 1, 2), (None,)),
    ],
)
def test_the_rendered_messages_of_an_episode_are_the_prompts_in_process(
    tokenizer, reply: str, prompt: str, history: int | str | None, system: str | None
) -> None:
    template = load_prompt(prompt, history, EXAMPLES)
    here = ChatDialogue(
        tokenizer, reply=reply, prompt=template, system_message=system, max_observation_tokens=None
    )
    there = MessageDialogue(reply=reply, prompt=template, system_message=system)
    ids: list[int] = []
    past_here: list[tuple[str, tuple[int, ...]]] = []
    past_there: list[Exchange] = []
    for observation, said in zip(observations(), SAID[reply], strict=True):
        written = here.prompt(past_here, observation)
        ids = [*([] if written.new_sequence else ids), *written.ids]
        messages = there.messages(past_there, observation)
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # Decoded, since a server may split text into other tokens where ours joins two pieces.
        assert tokenizer.decode(ids) == rendered
        assert {"role": "system", "content": system} in messages or system is None
        sampled = (*tokenizer(said, add_special_tokens=False)["input_ids"], *sorted(here.stop_ids)[-1:])
        parsed = there.parse(said, complete=True)
        assert parsed == here.parse(sampled)
        past_here.append((observation, sampled))
        past_there.append(Exchange(observation, said, parsed.text))
        ids += sampled


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_read_as_in_process_whether_it_is_complete_or_cut_off(tokenizer, reply: str) -> None:
    here = ChatDialogue(tokenizer, reply=reply)
    there = MessageDialogue(reply=reply)
    parts = ["<think>", "</think>", "<action>", "</action>", "</think> <action>go</action>", "go", " ", "\n"]
    draw = random.Random(0)
    valid = 0
    for _ in range(1500):
        text = "".join(draw.choices(parts, k=draw.randrange(7)))
        if reply == "plain" and "</think>" in text and "<think>" not in text:
            continue  # see below: in process, the template says whether it has opened the block
        for complete in (True, False):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            parsed = there.parse(text, complete=complete)
            assert parsed == here.parse([*ids, *([max(here.stop_ids)] if complete else [])]), text
            valid += parsed.valid
    assert valid > 10


def test_thoughts_in_a_block_that_the_template_opened_are_no_command() -> None:
    parsed = MessageDialogue().parse("I could go.\n</think>\n\ngo north", complete=True)
    assert (parsed.text, parsed.valid) == ("go north", True)


def test_reasoning_that_a_server_took_out_is_put_back_where_the_format_asks_for_it() -> None:
    thinking = MessageDialogue(reply="think_action")
    whole = thinking.with_reasoning("<action>go</action>", "hm")
    assert whole == "<think>hm</think><action>go</action>"
    assert thinking.parse(whole, complete=True).text == "go"
    assert thinking.with_reasoning(whole, "hm") == whole
    assert MessageDialogue().with_reasoning("go", "hm") == "go"


def test_an_observation_is_cut_at_four_characters_for_a_token_and_the_task_never_is() -> None:
    dialogue = MessageDialogue(max_observation_tokens=5)
    task = Briefing("find the cup", "", {}, None)
    first = Observation("a room with many things. find the cup", None, task)
    assert dialogue.messages((), first)[0]["content"].endswith("\n\na room with many thi\nfind the cup")
    assert dialogue.cuts(first)
    history = [Exchange(first, "go", "go")]
    assert dialogue.messages(history, "x" * 21)[-1]["content"] == "x" * 20
    assert dialogue.messages(history, "x" * 20)[-1]["content"] == "x" * 20
    assert not dialogue.cuts("x" * 20)


def test_the_hash_of_the_wording_follows_what_the_messages_say() -> None:
    literature = load_prompt("literature", 2)
    dialogues = [
        MessageDialogue(),
        MessageDialogue(reply="action_tags"),
        MessageDialogue(system_message="Be brief."),
        MessageDialogue(prompt=literature),
        MessageDialogue(prompt=literature, reply="action_tags"),
        MessageDialogue(prompt=load_prompt("literature", 3)),
        MessageDialogue(prompt=load_prompt("react", None, EXAMPLES)),
        MessageDialogue(prompt=load_prompt("react", None)),
    ]
    assert len({dialogue.wording.sha256 for dialogue in dialogues}) == len(dialogues)
    assert MessageDialogue().wording == MessageDialogue().wording
