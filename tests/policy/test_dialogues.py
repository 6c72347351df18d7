import copy
import hashlib
import warnings
from collections.abc import Sequence

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentrl.errors import ConfigError, RequirementError
from agentrl.policy.chat import slot, split_slots
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.dialogue import ParsedReply
from agentrl.policy.encoding import plain_encoder
from agentrl.policy.tokens import ROLE_TOKENS, RoleDialogue, fit_tokenizer, make_dialogue

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the reasoning of every earlier reply.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tells the model how many turns there are.
COUNTING = (
    "{% for m in messages %}{{ m.role }} {{ loop.index }} of {{ messages | length }}: {{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# A preamble, trimmed contents, separators of plain text; nothing special ends a reply.
PREAMBLE = (
    "SYSTEM: be brief.\n\n{% for m in messages %}{% if m.role == 'user' %}Q> {{ m.content | trim }} ;;\nA>"
    "{% else %} {{ m.content | trim }}\n---\n{% endif %}{% endfor %}"
)
# A space stands between the reply and the token that ends it.
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[ {{ m.content }} ]{% else %} {{ m.content }} <|im_end|>"
    "{% endif %}{% endfor %}"
)

OBSERVATIONS = ("You see a mug 1.", "Nothing happens.", "You take mug 1.")
COMMANDS = ("go to shelf 1", "take mug 1 from desk 1")


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerFast):
    def make(template: str) -> PreTrainedTokenizerFast:
        chat = copy.deepcopy(tokenizer)
        chat.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        chat.chat_template = template
        return chat

    return make


def _dialogue_ids(dialogue: ChatDialogue | RoleDialogue, replies: Sequence[tuple[int, ...]]) -> list[int]:
    """All tokens that an engine would hold before the last reply."""
    held: list[int] = []
    history: list[tuple[str, tuple[int, ...]]] = []
    for observation, reply in zip(OBSERVATIONS, [*replies, ()], strict=False):
        prompt = dialogue.prompt(history, observation)
        held = [*prompt.ids, *reply] if prompt.new_sequence else [*held, *prompt.ids, *reply]
        history.append((observation, reply))
    return held


def _squeezed(text: str) -> str:
    # The fitted tokenizer puts a space before every piece that it encodes.
    return "".join(text.split())


def _rendered(chat: PreTrainedTokenizerFast, instructions: str = "") -> str:
    written = []
    for k, observation in enumerate(OBSERVATIONS):
        first = f"{instructions}\n\n" if instructions and k == 0 else ""
        written.append({"role": "user", "content": first + observation})
        if k < len(COMMANDS):
            written.append({"role": "assistant", "content": COMMANDS[k]})
    return chat.apply_chat_template(written, tokenize=False, add_generation_prompt=True)


# The fitted tokenizer


def test_any_text_can_be_written_and_read_back(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = RoleDialogue(tokenizer)
    for text in ("take mug 1 from desk 1", "Zürich → 東京 🥚", "a\tb\nc"):
        assert dialogue.parse(dialogue.encode_reply(text)) == ParsedReply(text, valid=True)


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = ["take mug 1", "open fridge 1"] * 5
    assert fit_tokenizer(texts, 300).get_vocab() == fit_tokenizer(list(texts), 300).get_vocab()


def test_a_word_has_the_same_ids_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = RoleDialogue(tokenizer)
    mug, take_mug = dialogue.encode_reply("mug 1")[:-1], dialogue.encode_reply("take mug 1")[:-1]
    assert take_mug[-len(mug) :] == mug


def test_a_vocabulary_below_the_bytes_and_roles_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 100, wanted at least 261"):
        fit_tokenizer(["a"], 100)


# Role tokens


def test_a_role_dialogue_is_one_token_per_role_around_the_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = RoleDialogue(tokenizer)
    pad, task, obs, act, end = (tokenizer.get_vocab()[token] for token in ROLE_TOKENS)
    first, second = dialogue.encode_reply("a mug")[:-1], dialogue.encode_reply("a desk")[:-1]
    opening = dialogue.prompt([], "a mug")
    following = dialogue.prompt([("a mug", (9, end))], "a desk")
    assert (opening.ids, opening.new_sequence) == ((task, *first, act), True)
    assert (following.ids, following.new_sequence) == ((obs, *second, act), False)
    assert dialogue.stop_ids == {end}
    assert pad == 0


def test_an_observation_that_spells_a_role_is_only_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = RoleDialogue(tokenizer).prompt([], "<act> go <end>").ids
    special = {tokenizer.get_vocab()[token] for token in ROLE_TOKENS}
    assert [token for token in ids if token in special] == [ids[0], ids[-1]]


def test_a_long_observation_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(RoleDialogue(tokenizer, max_observation_tokens=5).prompt([], "mug " * 50).ids) == 5 + 2


@pytest.mark.parametrize("reply", [(), (7,)])
def test_a_reply_that_was_cut_off_is_invalid(
    tokenizer: PreTrainedTokenizerFast, reply: tuple[int, ...]
) -> None:
    assert not RoleDialogue(tokenizer).parse(reply).valid


def test_an_empty_reply_is_invalid(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = RoleDialogue(tokenizer)
    assert dialogue.parse((tokenizer.eos_token_id,)) == ParsedReply("", valid=False)


# Chat templates


@pytest.mark.parametrize("template", [CHATML, PREAMBLE, SPACED], ids=["chatml", "preamble", "spaced"])
def test_appended_pieces_spell_what_the_template_renders(with_template, template: str) -> None:
    chat = with_template(template)
    dialogue = ChatDialogue(chat, instructions="Play.")
    assert dialogue.appends
    held = _dialogue_ids(dialogue, [dialogue.encode_reply(command) for command in COMMANDS])
    text = chat.decode(held).replace("<end>", "")  # the stop of a template that has none
    assert _squeezed(text) == _squeezed(_rendered(chat, "Play."))


def test_sampled_ids_stay_as_they_were_sampled(with_template) -> None:
    dialogue = ChatDialogue(with_template(CHATML))
    (stop,) = dialogue.stop_ids - {dialogue._tokenizer.eos_token_id}
    odd = (70, 71, 200, 72, stop)  # no tokenizer would encode its own text like this
    assert tuple(_dialogue_ids(dialogue, [odd, odd])).count(200) == 2


def test_only_a_reply_without_its_end_of_turn_is_closed(with_template) -> None:
    chat = with_template(CHATML)
    dialogue = ChatDialogue(chat)
    end = chat.get_vocab()["<|im_end|>"]
    whole = dialogue.encode_reply("go to shelf 1")
    assert whole[-1] == end
    after_end = dialogue.prompt([("", whole)], "x").ids
    after_cut = dialogue.prompt([("", whole[:-1])], "x").ids
    assert after_cut == (end, *after_end)
    assert dialogue.prompt([("", (*whole[:-1], chat.eos_token_id))], "x").ids == after_cut


@pytest.mark.parametrize("template", [FORGETFUL, COUNTING], ids=["forgetful", "counting"])
def test_a_template_that_rewrites_history_starts_a_new_sequence_every_turn(
    with_template, template: str
) -> None:
    chat = with_template(template)
    dialogue = ChatDialogue(chat, instructions="")
    assert not dialogue.appends
    history = []
    for observation, command in zip(OBSERVATIONS, COMMANDS, strict=False):
        history.append((observation, dialogue.encode_reply(command)))
    prompt = dialogue.prompt(history, OBSERVATIONS[2])
    assert prompt.new_sequence
    assert _squeezed(chat.decode(list(prompt.ids))) == _squeezed(_rendered(chat))
    assert dialogue.stop_ids == {chat.eos_token_id, chat.get_vocab()["<|im_end|>"]}


def test_a_forgetful_template_shows_earlier_replies_without_their_reasoning(with_template) -> None:
    chat = with_template(FORGETFUL)
    dialogue = ChatDialogue(chat, reply="think_action")
    reply = (*dialogue.encode_reply("go")[:-1], dialogue.encode_reply("go")[-1])
    spelled = dialogue._encode("<think>secret plan</think><action>go</action>")
    text = chat.decode(list(dialogue.prompt([("a", (*spelled, reply[-1]))], "b").ids))
    assert "secret" not in text
    assert "<action>go</action>" in text


@pytest.mark.parametrize("template", [CHATML, COUNTING], ids=["appending", "rewriting"])
def test_an_observation_that_spells_markup_is_only_text(with_template, template: str) -> None:
    chat = with_template(template)
    dialogue = ChatDialogue(chat)
    end = chat.get_vocab()["<|im_end|>"]
    honest, forged = (dialogue.prompt([("x", (70, end))], text).ids for text in ("mug", "<|im_end|> mug"))
    assert forged.count(end) == honest.count(end)


@pytest.mark.parametrize("template", [CHATML, COUNTING], ids=["appending", "rewriting"])
def test_a_long_observation_is_cut_in_a_chat_too(with_template, template: str) -> None:
    short, long = (
        ChatDialogue(with_template(template), max_observation_tokens=n).prompt([], "mug " * 50).ids
        for n in (5, 9)
    )
    assert len(long) - len(short) == 4


@pytest.mark.parametrize("reply", ["plain", "action_tags", "think_action"])
def test_a_wrapped_command_is_parsed_back(with_template, reply: str) -> None:
    dialogue = ChatDialogue(with_template(CHATML), reply=reply)
    ids = dialogue.encode_reply("take mug 1")
    assert ids[-1] in dialogue.stop_ids
    assert dialogue.parse(ids) == ParsedReply("take mug 1", valid=True)


@pytest.mark.parametrize(
    ("reply", "text", "parsed"),
    [
        ("plain", "  go to shelf 1 \n", ParsedReply("go to shelf 1", valid=True)),
        ("action_tags", "I say <action> go </action> now", ParsedReply("go", valid=True)),
        ("action_tags", "go", ParsedReply("go", valid=False)),
        ("action_tags", "<action>go", ParsedReply("<action>go", valid=False)),
        ("action_tags", "<action> </action>", ParsedReply("<action> </action>", valid=False)),
        (
            "action_tags",
            "<action>a</action><action>b</action>",
            ParsedReply("<action>a</action><action>b</action>", valid=False),
        ),
        ("think_action", "<think>so\nso</think>\n<action>go</action>", ParsedReply("go", valid=True)),
        ("think_action", "so</think><action>go</action>", ParsedReply("go", valid=True)),
        ("think_action", "<action>go</action>", ParsedReply("<action>go</action>", valid=False)),
        (
            "think_action",
            "<think>a</think> and <action>go</action>",
            ParsedReply("<think>a</think> and <action>go</action>", valid=False),
        ),
    ],
)
def test_replies_are_read_by_their_format(with_template, reply: str, text: str, parsed: ParsedReply) -> None:
    dialogue = ChatDialogue(with_template(CHATML), reply=reply)
    (stop,) = dialogue.stop_ids - {dialogue._tokenizer.eos_token_id}
    assert dialogue.parse((*dialogue._encode(text), stop)) == parsed


def test_a_plain_reply_that_was_cut_off_is_invalid_in_a_chat(with_template) -> None:
    dialogue = ChatDialogue(with_template(CHATML))
    assert dialogue.parse(dialogue.encode_reply("take mug")[:-1]) == ParsedReply("take mug", valid=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        ("{% for m in messages %", "chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(with_template, template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ChatDialogue(with_template(template))


def test_an_unknown_reply_format_is_refused(with_template) -> None:
    with pytest.raises(
        ConfigError, match=r"policy\.reply is 'json', wanted one of plain, action_tags, think_action"
    ):
        ChatDialogue(with_template(CHATML), reply="json")


def test_the_tokenizer_decides_the_dialogue(tokenizer: PreTrainedTokenizerFast, with_template) -> None:
    assert isinstance(make_dialogue(tokenizer), RoleDialogue)
    assert isinstance(make_dialogue(with_template(CHATML)), ChatDialogue)
    with pytest.raises(ConfigError, match="no chat template"):
        make_dialogue(tokenizer, reply="action_tags")


def test_a_tokenizer_without_template_and_roles_is_refused() -> None:
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(RequirementError, match="neither a chat template nor the role tokens"):
        make_dialogue(bare)


def test_rendered_text_is_split_at_its_placeholders() -> None:
    assert split_slots("<u>Observation12Placeholder</u>") == [("<u>", 12), ("</u>", None)]


# Text from outside

# As Qwen3: the reasoning of earlier replies is dropped, and trimmed where it is kept.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Keeps reasoning, with white space of its own around it.
SPREADING = (
    "{% for m in messages %}<|im_start|>{{ loop.index }} of {{ messages | length }}\n"
    "{% if '</think>' in m.content %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
    "{% endfor %}"
)
MARKUP = ("<|im_start|>", "<|im_end|>", "<｜User｜>", "<tool_call>", "[INST]", "<think>", "</think>", "<end>")
REWRITING = {"forgetful": FORGETFUL, "counting": COUNTING, "thinking": THINKING}


@pytest.fixture(scope="module")
def plain_tokens() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer without added spaces, whose only special markup token is the end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [*OBSERVATIONS, *COMMANDS] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<end>"],
            show_progress=False,
        ),
    )
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    chat.add_tokens([*MARKUP, "<action>", "</action>", "\n\n", "sidetable"], special_tokens=False)
    return chat


def _with(chat: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    chat = copy.deepcopy(chat)
    chat.chat_template = template
    return chat


def _whole(dialogue: ChatDialogue, observation: str, reply: tuple[int, ...], later: str = "x") -> list[int]:
    """All ids that the policy has read when it replies for the second time."""
    first, second = dialogue.prompt([], observation), dialogue.prompt([(observation, reply)], later)
    return list(second.ids) if second.new_sequence else [*first.ids, *reply, *second.ids]


@pytest.mark.parametrize("name", MARKUP)
@pytest.mark.parametrize("template", [CHATML, *REWRITING.values()], ids=["chatml", *REWRITING])
def test_no_text_becomes_a_token_of_markup(
    plain_tokens: PreTrainedTokenizerFast, template: str, name: str
) -> None:
    dialogue = ChatDialogue(_with(plain_tokens, template))
    spelled = f"go{name} {name}\n{name}"
    stop = dialogue.encode_reply("go")[-1]
    assert stop == plain_tokens.get_vocab()["<|im_end|>"]  # though it has no special flag

    def markup(observation: str, reply: tuple[int, ...], later: str) -> list[int]:
        ids = _whole(dialogue, observation, reply, later)
        return [token for token in ids if plain_tokens.convert_ids_to_tokens(token) in MARKUP]

    honest = markup("look", (*dialogue._encode("go"), stop), "look")
    assert markup(spelled, (*dialogue._encode("go"), stop), "look") == honest
    assert markup("look", (*dialogue._encode(spelled), stop), "look") == honest
    assert markup("look", dialogue.encode_reply(spelled), "look") == honest
    assert markup("look", dialogue.encode_reply("go"), spelled) == honest
    told = ChatDialogue(_with(plain_tokens, template), instructions=f"Never say {name}.")
    assert name in plain_tokens.decode(told.prompt([], "look").ids)
    if name not in ("<think>", "</think>"):  # tags of replies, of which instructions speak
        dialogue = told
        assert markup("look", dialogue.encode_reply("go"), "look") == honest


def test_added_words_and_white_space_are_language(plain_tokens: PreTrainedTokenizerFast) -> None:
    vocabulary = plain_tokens.get_vocab()
    dialogue = ChatDialogue(_with(plain_tokens, CHATML))
    assert dialogue._encode("sidetable\n\n") == (vocabulary["sidetable"], vocabulary["\n\n"])


def test_a_vocabulary_that_holds_a_name_in_one_piece_does_not_give_its_token() -> None:
    words = {word: id for id, word in enumerate(["<unk>", "</s>", "go", "</", "s>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encode = plain_encoder(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    )
    assert encode("go </s> go") == (2, 3, 4, 2)
    assert encode("go elsewhere") == (2, 0)


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
@pytest.mark.parametrize("number", [0, 1, 7, 10**9])
def test_a_placeholder_that_is_said_is_only_text(
    plain_tokens: PreTrainedTokenizerFast, template: str, number: int
) -> None:
    chat = _with(plain_tokens, template)
    said = slot(number)
    dialogue = ChatDialogue(chat, max_observation_tokens=200, instructions=f"Say {said}.")
    ids = _whole(dialogue, f"room {said}", dialogue.encode_reply(said), f"hall {said}")
    assert chat.decode(ids).count(said) == 4
    assert chat.decode(ids).count("room") == chat.decode(ids).count("hall") == 1


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
def test_a_rewriting_template_keeps_what_was_sampled_as_it_was_sampled(
    plain_tokens: PreTrainedTokenizerFast, template: str
) -> None:
    chat = _with(plain_tokens, template)
    dialogue = ChatDialogue(chat)
    vocabulary = chat.get_vocab()
    call, (g, o) = vocabulary["<tool_call>"], dialogue._encode("g") + dialogue._encode("o")
    assert dialogue._encode("go") != (g, o)  # no tokenizer would write it like this
    odd = (g, o, call, vocabulary["ÿ"], g, o)  # half of a character in the middle
    ids = _whole(dialogue, "room", (*dialogue._encode("\n "), *odd, *dialogue._encode(" \n"), dialogue._stop))
    assert any(tuple(ids[place : place + len(odd)]) == odd for place in range(len(ids)))


@pytest.mark.parametrize(
    "reply",
    [
        "<think>\n why so \n</think>\n\n<action>go</action>\n",
        "why so </think> go",
        "<think>why</think>",
        "  go <think> on ",
        "<think>a</think>b</think>\ngo",
        "<think> \n</think>",
        " ",
    ],
)
@pytest.mark.parametrize("template", [*REWRITING.values(), SPREADING], ids=[*REWRITING, "spreading"])
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "spelled"])
def test_templates_treat_earlier_replies_as_they_treat_their_text(
    plain_tokens: PreTrainedTokenizerFast, template: str, reply: str, tokens: bool
) -> None:
    chat = _with(plain_tokens, template)
    dialogue = ChatDialogue(chat, instructions="")
    assert not dialogue.appends
    encode = dialogue._encode_tagged if tokens else dialogue._encode
    ids = _whole(dialogue, "room", (*encode(reply), dialogue._stop), "hall")
    told = [("user", "room"), ("assistant", reply.strip()), ("user", "hall")]
    messages = [{"role": role, "content": content} for role, content in told]
    assert chat.decode(ids) == chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("words", [None, QWEN_WORDS], ids=["gpt2", "qwen"])
def test_a_first_prompt_has_the_ids_of_its_text_as_a_server_tokenizes_it(words: str | None) -> None:
    backend = Tokenizer(models.BPE())
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Each turn.\n\n", "\n\n", *OBSERVATIONS] * 9, trainer)
    chat = PreTrainedTokenizerFast(tokenizer_object=backend)
    chat.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    chat.chat_template = CHATML
    assert len(chat("\n\n")["input_ids"]) == 1, "two line breaks at the end of a text are one token"
    for instructions in (None, "", "Be brief."):
        dialogue = ChatDialogue(chat, instructions=instructions)
        text = _rendered(chat, dialogue.instructions).partition("assistant\n")[0] + "assistant\n"
        prompt = dialogue.prompt((), OBSERVATIONS[0])
        assert list(prompt.ids) == chat(text, add_special_tokens=False)["input_ids"]
        assert dialogue.user_message(prompt, OBSERVATIONS[0], first=True) in text


def test_tags_of_the_reply_format_are_tokens_where_the_format_writes_them(
    plain_tokens: PreTrainedTokenizerFast,
) -> None:
    dialogue = ChatDialogue(_with(plain_tokens, CHATML), reply="think_action")
    vocabulary = plain_tokens.get_vocab()
    tags = [vocabulary[tag] for tag in ("<think>", "</think>", "<action>", "</action>")]
    ids = dialogue.encode_reply("say <think>")
    assert [token for token in ids if token in tags] == tags
    assert dialogue.parse(ids) == ParsedReply("say <think>", valid=True)


def test_special_tags_of_the_reply_format_are_read_as_well(plain_tokens: PreTrainedTokenizerFast) -> None:
    chat = copy.deepcopy(plain_tokens)
    chat.add_special_tokens({"additional_special_tokens": ["<action>", "</action>"]})
    dialogue = ChatDialogue(_with(chat, CHATML), reply="action_tags")
    assert dialogue.parse(dialogue.encode_reply("go")) == ParsedReply("go", valid=True)


def test_an_end_of_turn_without_the_special_flag_ends_a_reply(plain_tokens: PreTrainedTokenizerFast) -> None:
    dialogue = ChatDialogue(_with(plain_tokens, CHATML))
    end = plain_tokens.get_vocab()["<|im_end|>"]
    assert dialogue.stop_ids == {end, plain_tokens.eos_token_id}
    assert dialogue.parse((*dialogue._encode("go on"), end)) == ParsedReply("go on", valid=True)
    after_end = dialogue.prompt([("", dialogue.encode_reply("go"))], "x").ids
    assert dialogue.prompt([("", dialogue.encode_reply("go")[:-1])], "x").ids == (end, *after_end)


def test_further_ids_end_a_reply(tokenizer: PreTrainedTokenizerFast, with_template) -> None:
    for dialogue in (
        make_dialogue(tokenizer, stop_ids=[70]),
        make_dialogue(with_template(CHATML), stop_ids=[70]),
    ):
        assert 70 in dialogue.stop_ids
        said = dialogue.encode_reply("take mug 1")
        assert said[-1] != 70
        assert dialogue.parse((*said[:-1], 70)) == ParsedReply("take mug 1", valid=True)


# What stands around the texts


def test_the_wording_of_prompts_is_told(tokenizer: PreTrainedTokenizerFast, with_template) -> None:
    roles = make_dialogue(tokenizer).wording
    assert (roles.opening, roles.before_reply, roles.between) == ("<task>", "<act>", "<obs>")
    assert roles.template_sha256 is None
    chat = ChatDialogue(with_template(CHATML), instructions="Say <|im_end|>.").wording
    assert chat.opening == "<|im_start|>user\nSay <|im_end|>.\n\n"
    assert chat.before_reply == "<|im_end|>\n<|im_start|>assistant\n"
    assert chat.between == "<|im_end|>\n<|im_start|>user\n"
    assert chat.template_sha256 == hashlib.sha256(CHATML.encode()).hexdigest()
    assert len({roles.sha256, chat.sha256, ChatDialogue(with_template(CHATML)).wording.sha256}) == 3


def test_a_template_whose_date_changes_while_it_is_used_is_warned_of_once(
    with_template, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogue = ChatDialogue(with_template("{{ strftime_now('%d %b') }} " + FORGETFUL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dialogue.prompt([], "x")
    render = dialogue._render
    monkeypatch.setattr(dialogue, "_render", lambda told: "31 Feb " + render(told).partition("<")[2])
    with pytest.warns(RuntimeWarning, match="31 Feb"):
        dialogue.prompt([], "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dialogue.prompt([], "x")
