"""Tokenizers and dialogues of policies: fitted ones with role tokens, and the choice by chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from agentrl.env.briefing import Briefing
from agentrl.errors import ConfigError, RequirementError
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.dialogue import Dialogue, History, ParsedReply, Prompt, Wording, sha256_of, without_end
from agentrl.policy.encoding import (
    ObservationEncoder,
    decoder,
    plain_encoder,
    special_ids,
)
from agentrl.policy.prompt import Example, PromptTemplate, load_prompt, task_of
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.text_cache import TextCache

ROLE_TOKENS = ("<pad>", "<task>", "<obs>", "<act>", "<end>")


def fit_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE on environment text, with one special token per role of a dialogue.

    Any text can be encoded, since every byte is a token. A small corpus gives fewer ids than `vocab_size`.

    Raises:
        ConfigError: If `vocab_size` is smaller than the number of bytes and roles.
    """
    smallest = len(ROLE_TOKENS) + 256
    if vocab_size < smallest:
        raise ConfigError(
            f"policy.vocab_size is {vocab_size}, wanted at least {smallest}: the bytes and the roles"
        )
    # The prefix space gives a word the same ids at the start of a text as inside it, so names can be matched.
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
    max_observation_tokens: int | None = 96,
    stop_ids: Collection[int] = (),
    template_arguments: Mapping[str, Any] | None = None,
    prompt: PromptTemplate | None = None,
    system_message: str | None = None,
) -> Dialogue:
    """Create the dialogue of a tokenizer: by its chat template, else by its role tokens.

    Args:
        tokenizer: The tokenizer of the policy.
        reply: The format of replies; see `ChatDialogue`.
        max_observation_tokens: The number of tokens after which an observation is cut; None cuts none.
        stop_ids: Further ids that end a reply, such as those of `agentrl.policy.model.end_ids`.
        template_arguments: The arguments passed to the chat template whenever it is rendered.
        prompt: The template of the user's messages; None for the text of `plain`.
        system_message: The text of a system message; None leaves it to the chat template.
    """
    if tokenizer.chat_template:
        return ChatDialogue(
            tokenizer,
            reply=reply,
            max_observation_tokens=max_observation_tokens,
            stop_ids=stop_ids,
            template_arguments=template_arguments,
            prompt=prompt,
            system_message=system_message,
        )
    name = "plain" if prompt is None else prompt.name
    history = None if prompt is None else prompt.history
    check_without_template(
        reply, template_arguments, prompt=name, history=history, system_message=system_message
    )
    return RoleDialogue(tokenizer, max_observation_tokens=max_observation_tokens, stop_ids=stop_ids)


def configured_dialogue(
    block: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Collection[int] = (),
    examples: Sequence[Example] = (),
) -> Dialogue:
    """Create the dialogue that the `policy` block of a configuration describes.

    Args:
        block: The block.
        tokenizer: The tokenizer of the policy.
        stop_ids: Further ids that end a reply.
        examples: The solved examples that its prompt shows.
    """
    return make_dialogue(
        tokenizer,
        reply=block.reply,
        max_observation_tokens=block.max_observation_tokens,
        stop_ids=stop_ids,
        template_arguments=block.template_arguments,
        prompt=load_prompt(block.prompt, block.history, examples),
        system_message=block.system_message,
    )


def check_without_template(
    reply: str,
    template_arguments: Mapping[str, Any] | None,
    *,
    prompt: str = "plain",
    history: int | str | None = None,
    system_message: str | None = None,
) -> None:
    """Refuse settings that need a chat template.

    Raises:
        ConfigError: Naming the key.
    """
    for key, value, usual in (
        ("prompt", prompt, ("plain",)),
        ("history", history, (None, "full")),
        ("system_message", system_message, (None,)),
    ):
        if value not in usual:
            raise ConfigError(
                f"policy.{key} is {value!r}, but the tokenizer has no chat template: wanted "
                f"{'null' if None in usual else usual[0]} or a chat model"
            )
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
        tokenizer: A tokenizer from `fit_tokenizer`, or another with the same role tokens.
        max_observation_tokens: The number of tokens after which an observation is cut; None cuts none.
        stop_ids: Further ids that end a reply.
    """

    instructions, system_message = "", None
    starts_anew, shown = False, frozenset[str]()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_observation_tokens: int | None = 96,
        stop_ids: Collection[int] = (),
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in ROLE_TOKENS if token not in vocabulary]
        if missing:
            raise RequirementError(
                f"the tokenizer has neither a chat template nor the role tokens {', '.join(missing)}; "
                "use a chat model or a policy trained here, or name a template: policy.chat_template=FILE"
            )
        _, self._task, self._observation, self._act, self._end = (vocabulary[token] for token in ROLE_TOKENS)
        self.stop_ids = frozenset({self._end, *stop_ids})
        around = (self._task,), (self._act,), (self._observation,)
        self.wording = Wording("<task>", "<act>", "<obs>", sha256_of(around))
        self._encode = plain_encoder(tokenizer)
        self._decode = decoder(tokenizer, special_ids(tokenizer))
        self.cache = TextCache()
        self._encode_observation = ObservationEncoder(
            tokenizer, self._encode, max_observation_tokens, self.cache
        )
        self.encode_reply = self.cache.memoize(self._encode_reply)
        self._cached_parse = self.cache.memoize(self._parse)

    def prompt(self, history: History, observation: str) -> Prompt:
        """Return the role tokens and the observation that follow `history`."""
        role = self._observation if history else self._task
        task = None if history else task_of(observation)
        seen = self._encode_observation.with_task(observation, task)
        cut = self._encode_observation.note_cut(observation)
        return Prompt((role, *seen, self._act), new_sequence=not history, cut=cut)

    def for_episode(self, briefing: Briefing) -> Self:
        """Return this dialogue: it knows no tools."""
        return self

    def unsaid(self, actions: Iterable[str]) -> str | None:
        """Return None: a reply can give any action."""
        return None

    def parse(self, ids: Sequence[int]) -> ParsedReply:
        """Return the command in a reply."""
        return self._cached_parse(tuple(ids))

    def encode_written(self, text: str) -> tuple[int, ...]:
        """Return the ids of a reply that is given as it is written, which is its command."""
        return self.encode_reply(text)

    def reply_text(self, ids: Sequence[int]) -> str:
        """Return a reply as it is written."""
        return self.parse(ids).text

    def user_message(self, prompt: Prompt, observation: str, *, first: bool) -> str:
        """Return the text of the observation that a prompt ends with, cuts included."""
        ids = prompt.ids[1:-1]
        return observation if ids == self._encode(observation) else self._decode(ids).strip()

    def _encode_reply(self, text: str) -> tuple[int, ...]:
        return (*self._encode(text), self._end)

    def _parse(self, ids: tuple[int, ...]) -> ParsedReply:
        said = without_end(ids, self.stop_ids)
        text = self._decode(said).strip()
        return ParsedReply(text, bool(text) and len(said) < len(ids))


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token, empty for a special one."""
    return cast(str, tokenizer.decode([token], skip_special_tokens=True))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the vocabulary, as hex digits; equal ones give token ids the same meaning."""
    listed = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(listed.encode()).hexdigest()
