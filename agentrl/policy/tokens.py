"""Text to token ids and back: a tokenizer fitted on environment text, and dialogues that append ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, Protocol, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from agentrl.errors import ConfigError, RequirementError
from agentrl.policy.chat import (
    END_THINK,
    THINK,
    Message,
    begun_reply,
    check_arguments,
    messages,
    probe_template,
    slot,
    split_slots,
    think_block,
)
from agentrl.policy.thinking import Ending, Thinking, pieces_of

ROLE_TOKENS = ("<pad>", "<task>", "<obs>", "<act>", "<end>")
CACHED_TEXTS = 65536

History = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy reads before a reply: ids to append to the sequence, or a new one when `fresh`."""

    ids: tuple[int, ...]
    fresh: bool


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """The command in a reply; where none was found, `text` is what was written and `valid` is False."""

    text: str
    valid: bool


class Dialogue(Protocol):
    """How an episode is written as tokens.

    One whose replies may think before they choose has `thinking` and `encode_choice` beside these, as
    `ChatDialogue` has.
    """

    stop_ids: frozenset[int]

    def prompt(self, history: History, observation: str) -> Prompt:
        """The prompt after `history`, the (observation, reply ids) of the turns so far."""
        ...

    def encode_reply(self, text: str) -> tuple[int, ...]:
        """The reply that says `text`, with its stop id."""
        ...

    def parse(self, ids: Sequence[int]) -> ParsedReply: ...


def fit_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE on environment text, with one special token per role of a dialogue.

    Any text can be encoded, since every byte is a token. A small corpus gives fewer ids than `vocab_size`.
    """
    smallest = len(ROLE_TOKENS) + 256
    if vocab_size < smallest:
        raise ConfigError(
            f"policy.vocab_size is {vocab_size}, wanted at least {smallest}: the bytes and the roles"
        )
    # With a leading space a word has the same ids at the start of a text as inside it: names can be matched.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(ROLE_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    make = cast(Callable[..., PreTrainedTokenizerFast], PreTrainedTokenizerFast)
    return make(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<task>", "<obs>", "<act>"],
        clean_up_tokenization_spaces=False,
    )


def make_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    *,
    reply: str = "plain",
    max_observation_tokens: int = 96,
    template_arguments: Mapping[str, Any] | None = None,
) -> Dialogue:
    """The dialogue that a tokenizer was made for: by its chat template, else by its role tokens."""
    if tokenizer.chat_template:
        return ChatDialogue(
            tokenizer,
            reply=reply,
            max_observation_tokens=max_observation_tokens,
            template_arguments=template_arguments,
        )
    check_without_template(reply, template_arguments)
    return RoleDialogue(tokenizer, max_observation_tokens=max_observation_tokens)


def check_without_template(reply: str, template_arguments: Mapping[str, Any] | None) -> None:
    """Refuse what only a chat template can do.

    Raises:
        ConfigError: naming the key.
    """
    if template_arguments:
        raise ConfigError(
            f"policy.template_arguments is {dict(template_arguments)}, but the tokenizer has no chat "
            "template: wanted {} or a chat model"
        )
    if reply != "plain":
        raise ConfigError(
            f"policy.reply is {reply!r}, but the tokenizer has no chat template: wanted plain or a chat model"
        )


class RoleDialogue:
    """`<task> observation <act> reply <end> <obs> observation <act> reply <end> …`, one role token per part.

    Args:
        tokenizer: from `fit_tokenizer`, or one that knows the same role tokens.
        max_observation_tokens: an observation is cut after so many.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_observation_tokens: int = 96) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in ROLE_TOKENS if token not in vocabulary]
        if missing:
            raise RequirementError(
                f"the tokenizer has neither a chat template nor the role tokens {', '.join(missing)}; "
                "use a chat model's folder, or a policy trained here"
            )
        _, self._task, self._observation, self._act, self._end = (vocabulary[token] for token in ROLE_TOKENS)
        self.stop_ids = frozenset({self._end})
        self._encode = plain_encoder(tokenizer)
        self._limit = max_observation_tokens
        self.encode_reply = lru_cache(CACHED_TEXTS)(self._reply)
        self._parsed = lru_cache(CACHED_TEXTS)(self._parse)
        self._decode = _decoder(tokenizer)

    def prompt(self, history: History, observation: str) -> Prompt:
        role = self._observation if history else self._task
        return Prompt((role, *self._encode(observation)[: self._limit], self._act), fresh=not history)

    def parse(self, ids: Sequence[int]) -> ParsedReply:
        return self._parsed(tuple(ids))

    def _reply(self, text: str) -> tuple[int, ...]:
        return (*self._encode(text), self._end)

    def _parse(self, ids: tuple[int, ...]) -> ParsedReply:
        text = self._decode(ids)
        return ParsedReply(text, bool(text) and ids[-1] in self.stop_ids)


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How a command stands in a reply."""

    instructions: str
    wrap: str
    pattern: re.Pattern[str]  # of the whole reply, with a group `command`
    tagged: bool
    thinks: bool = False  # before the command, in a think block


_TASK = (
    "You act in a text environment to solve the task it gives you. Each turn you read what happened and reply"
)
REPLY_FORMATS: dict[str, ReplyFormat] = {
    "plain": ReplyFormat(
        f"{_TASK} with your next command and nothing else.",
        "{}",
        re.compile(r"(?P<command>.*)", re.DOTALL),
        False,
    ),
    "action_tags": ReplyFormat(
        f"{_TASK} with your next command between <action> and </action>.",
        "<action>{}</action>",
        re.compile(
            r"(?:(?!<action>).)*<action>(?P<command>(?:(?!<action>).)*?)</action>(?:(?!<action>).)*",
            re.DOTALL,
        ),
        True,
    ),
    "think_action": ReplyFormat(
        f"{_TASK} with your reasoning between <think> and </think>, then your next command between <action> "
        "and </action>.",
        "<action>{}</action>",
        # The opening tag may be part of the template's generation prompt.
        re.compile(
            r"(?:<think>)?(?:(?!</think>).)*</think>\s*<action>(?P<command>(?:(?!</?action>).)*)</action>",
            re.DOTALL,
        ),
        True,
        thinks=True,
    ),
}
# What is left of think_action where the prompt holds a think block already.
_AFTER_THOUGHTS = ReplyFormat(
    REPLY_FORMATS["action_tags"].instructions,
    "<action>{}</action>",
    re.compile(r"<action>(?P<command>(?:(?!</?action>).)*)</action>", re.DOTALL),
    True,
)


class ChatDialogue:
    """The dialogue of a chat template, for any tokenizer that has one.

    The template's pieces around a turn are found once and appended as ids: what was sampled is never rendered
    again. Where a template rewrites earlier turns (drops their reasoning, numbers them), every prompt is the
    whole dialogue rendered anew and starts a new sequence.

    Args:
        tokenizer: one with a chat template.
        reply: plain is the command itself; action_tags and think_action look for it in tags. What the prompt
            has written of the reply already is not written again: a think block that it opens is closed, and
            where it holds a whole one, think_action goes straight to the command.
        max_observation_tokens: an observation is cut after so many.
        instructions: stand before the first observation; None takes those of the reply format.
        template_arguments: given to the template whenever it is rendered.

    Attributes:
        appends: whether prompts extend the sequence.
        thinking: how a reply thinks before its choice; None where it does not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reply: str = "plain",
        max_observation_tokens: int = 96,
        instructions: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if reply not in REPLY_FORMATS:
            raise ConfigError(f"policy.reply is {reply!r}, wanted one of {', '.join(REPLY_FORMATS)}")
        self._tokenizer = tokenizer
        self._arguments = dict(template_arguments or {})
        if self._arguments:
            template = cast(Any, tokenizer).get_chat_template()
            check_arguments(template, self._arguments, tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
        self._format = REPLY_FORMATS[reply]
        if self._format.thinks and END_THINK in begun_reply(self._render):
            self._format = _AFTER_THOUGHTS
        self._instructions = self._format.instructions if instructions is None else instructions
        self._limit = max_observation_tokens
        self._encode = plain_encoder(tokenizer)
        self._markup = lru_cache(CACHED_TEXTS)(self._encode_markup)
        self._decode = _decoder(tokenizer, (THINK, END_THINK))
        pieces = probe_template(self._render, self._instructions)
        self.appends, self._opens, self._recalled = pieces.appends, pieces.opens, pieces.recalled
        self._opening, self._before_reply = self._markup(pieces.opening), self._markup(pieces.before_reply)
        self._lead, self._between = pieces.lead, self._markup(pieces.between)
        self._end_of_turn, self._after_end = self._find_end()
        ends = {self._end_of_turn, tokenizer.eos_token_id} - {None}
        if not ends:
            raise ConfigError(
                "the tokenizer has no eos_token and its chat template ends a reply with no special token"
            )
        self.stop_ids: frozenset[int] = frozenset(cast(set[int], ends))
        self._stop = self._end_of_turn if self._end_of_turn is not None else cast(int, tokenizer.eos_token_id)
        self._before, self.thinking = self._think(pieces.begun)
        self.encode_reply = lru_cache(CACHED_TEXTS)(self._reply)
        self.encode_choice = lru_cache(CACHED_TEXTS)(self._choice)
        self._parsed = lru_cache(CACHED_TEXTS)(self._parse)

    def prompt(self, history: History, observation: str) -> Prompt:
        if not self.appends:
            return Prompt(self._whole(history, observation), fresh=True)
        seen = self._encode(observation)[: self._limit]
        if not history:
            return Prompt((*self._opening, *seen, *self._before_reply), fresh=True)
        # A sampled end of turn is already there; a reply that was cut off, or ended otherwise, lacks it.
        ended = history[-1][1][-1:] == (self._end_of_turn,)
        return Prompt(
            (*(self._after_end if ended else self._between), *seen, *self._before_reply), fresh=False
        )

    def parse(self, ids: Sequence[int]) -> ParsedReply:
        return self._parsed(tuple(ids))

    def _reply(self, text: str) -> tuple[int, ...]:
        return (*self._before, *self._choice(text))

    def _choice(self, text: str) -> tuple[int, ...]:
        """A reply from where the thoughts before it are over."""
        if self._format.thinks:
            _, after = self._format.wrap.split("{}")
            return (*self._encode(text), *self._markup(after), self._stop)
        lead = "" if self._before else self._lead
        return (*self._encode(lead + self._format.wrap.format(text)), self._stop)

    def _think(self, begun: str) -> tuple[tuple[int, ...], Thinking | None]:
        """What stands before the choice in a reply without thoughts, and how one with thoughts has them."""
        if not (self._opens or self._format.thinks):
            return (), None
        silenced = partial(self._render, enable_thinking=False)
        block = think_block(partial(self._render, add_generation_prompt=False), silenced)
        opening, empty = ("", block.closing + block.gap) if self._opens else (block.opening, block.empty)
        if self._opens and block.empty.startswith(begun):
            empty = block.empty.removeprefix(begun)
        if not self._format.thinks:
            return self._markup(empty), None
        tag = self._format.wrap.split("{}")[0]
        ending = Ending(END_THINK, pieces_of(END_THINK, _texts_of_parts(self._tokenizer, END_THINK)))
        leads = {"": self._markup(block.gap + tag)}
        for beyond in ending.beyond - {""}:
            said = beyond.lstrip()
            if tag.startswith(said):
                leads[beyond] = self._markup(tag.removeprefix(said))
        thinking = Thinking(self._markup(self._lead + opening), ending, self._markup(block.closing), leads)
        return self._markup(self._lead + empty + tag), thinking

    def _parse(self, ids: tuple[int, ...]) -> ParsedReply:
        text = self._decode(ids)
        said, thought_over = text, True
        if self._opens and not self._format.thinks:
            thoughts, end, rest = text.partition(END_THINK)
            said, thought_over = (rest.strip() if end else thoughts), bool(end)
        found = self._format.pattern.fullmatch(said)
        # Tags say by themselves that a command is complete; a plain one that was cut off may be half of it.
        complete = self._format.tagged or (thought_over and bool(ids) and ids[-1] in self.stop_ids)
        if found is None or not complete or not found["command"].strip():
            return ParsedReply(text, valid=False)
        return ParsedReply(found["command"].strip(), valid=True)

    def _whole(self, history: History, observation: str) -> tuple[int, ...]:
        observations = [*(text for text, _ in history), observation]
        slots = [slot(turn) for turn in range(len(observations))]
        replies = [self._recalled + self._decode(ids) for _, ids in history]
        ids: list[int] = []
        for markup, turn in split_slots(self._render(messages(slots, replies, self._instructions))):
            ids.extend(self._markup(markup))
            if turn is not None:
                ids.extend(self._encode(observations[turn])[: self._limit])
        return tuple(ids)

    def _render(self, dialogue: list[Message], **arguments: Any) -> str:
        given = {"add_generation_prompt": True} | self._arguments | arguments
        return cast(str, self._tokenizer.apply_chat_template(dialogue, tokenize=False, **given))

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        call = cast(Callable[..., Any], self._tokenizer)
        return tuple(call(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _find_end(self) -> tuple[int | None, tuple[int, ...]]:
        """The special token with which the template ends a reply, if it has one, and what follows it."""
        special = {id for id, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        for place, token in enumerate(self._between):
            if token in special:
                return token, self._between[place + 1 :]
            if self._decode((token,)):
                break
        return None, self._between


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, as hex digits: token ids mean the same under equal ones."""
    listed = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(listed.encode()).hexdigest()


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], tuple[int, ...]]:
    """A cached encoder of text from outside, in which the names of special tokens are only text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        own = Tokenizer.from_str(backend.to_str())
        own.no_padding()
        own.no_truncation()
        own.encode_special_tokens = True
        return lru_cache(CACHED_TEXTS)(lambda text: tuple(own.encode(text, add_special_tokens=False).ids))

    def encode(text: str) -> tuple[int, ...]:
        call = cast(Callable[..., Any], tokenizer)
        return tuple(call(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    return lru_cache(CACHED_TEXTS)(encode)


def _decoder(tokenizer: PreTrainedTokenizerBase, read: Sequence[str] = ()) -> Callable[[Sequence[int]], str]:
    """Tokens to text without special tokens, but for those of the names in `read`."""
    special = tokenizer.added_tokens_decoder.items()
    kept = {id: token.content for id, token in special if token.special and token.content in read}

    def part(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def decode(ids: Sequence[int]) -> str:
        if kept.keys().isdisjoint(ids):
            return part(ids).strip()
        runs = (list(run) for _, run in groupby(ids, key=kept.get))
        return "".join(
            "".join(map(kept.__getitem__, run)) if run[0] in kept else part(run) for run in runs
        ).strip()

    return decode


def _texts_of_parts(tokenizer: PreTrainedTokenizerBase, end: str) -> dict[int, str]:
    """What the tokens write that might stand for a part of `end`."""
    # Some decoders drop a space in front, so a token is read behind another one.
    call = cast(Callable[..., Any], tokenizer)
    read = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before = call("a", add_special_tokens=False)["input_ids"][-1:]
    known = cast(str, read(before))
    edges = (end[0], end[-1])
    return {
        id: cast(str, read([*before, id])).removeprefix(known)
        for token, id in tokenizer.get_vocab().items()
        if token in end or any(edge in token for edge in edges)
    }
