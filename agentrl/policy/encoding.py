"""Encoding and decoding that never turns text from outside into markup tokens."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from agentrl.policy.text_cache import TextCache

_log = logging.getLogger(__name__)

Encode = Callable[[str], tuple[int, ...]]


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Return an encoder of text from outside, to which the names of markup tokens are ordinary text.

    Tokens such as <|im_end|>, <think> and <tool_call> never come out, whatever their "special" flag says; see
    `markup_ids` for the added tokens that do.
    """
    markup = markup_ids(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        described = json.loads(backend.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["special"] or token["id"] in markup
        own = Tokenizer.from_str(json.dumps(described))
        own.no_padding()
        own.no_truncation()
        own.encode_special_tokens = True

        def encode(text: str) -> tuple[int, ...]:
            return tuple(own.encode(text, add_special_tokens=False).ids)

    else:

        def encode(text: str) -> tuple[int, ...]:
            call = cast(Callable[..., Any], tokenizer)
            return tuple(call(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    barred = markup - ({tokenizer.unk_token_id} - ends)  # unknown text may become the unknown token

    def encode_as_text(text: str) -> tuple[int, ...]:
        ids = encode(text)
        if barred.isdisjoint(ids):
            return ids
        # Word and unigram vocabularies hold such a name as one token even so; split the text to avoid it.
        if len(text) < 2:
            return tuple(id for id in ids if id not in barred)
        middle = len(text) // 2
        return (*encode_as_text(text[:middle]), *encode_as_text(text[middle:]))

    return encode_as_text


class ObservationEncoder:
    """Encoder of observations, which are cut after a number of tokens; the task of an episode never is.

    It reads and caches little more of a text than it keeps. The first cut is logged.

    Args:
        tokenizer: The tokenizer.
        encode: Encodes text from outside.
        limit: The largest number of tokens; None cuts nothing.
        cache: Keeps the results.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encode: Encode, limit: int | None, cache: TextCache
    ) -> None:
        self.limit = limit
        # No token stands for more characters than its name has. The factor allows for normalizers that
        # shorten a text, the constant for the influence of a text's end on earlier tokens.
        longest = max(map(len, tokenizer.get_vocab()))
        self._room = None if limit is None else 4 * limit * longest + 1024
        self._encode = encode
        self._start = cache.memoize(self._encode_start)
        self._shortened = cache.memoize(self._shorten)
        self._logged = False

    def __call__(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, cut."""
        return self._start(text[: self._room])[0]

    def with_task(self, text: str, task: str | None) -> tuple[int, ...]:
        """Return the ids of a first observation, cut only outside of the task that it may contain."""
        if task is None or not self.cuts(text) or task in self.shorten(text):
            return self(text)
        before, _, _ = text.partition(task)
        return (*self(before.rstrip()), *self._encode(f"\n{task}" if before.strip() else task))

    def shorten_around(self, text: str, task: str | None) -> str:
        """Return a first observation, cut only outside of the task that it may contain."""
        short = self.shorten(text)
        if task is None or not self.cuts(text) or task in short:
            return short
        before = self.shorten(text.partition(task)[0].rstrip())
        return f"{before}\n{task}" if before else task

    def cuts(self, text: str) -> bool:
        """Return whether a text is cut."""
        return self._room is not None and (len(text) > self._room or self._start(text[: self._room])[1])

    def shorten(self, text: str) -> str:
        """Return a text, cut."""
        return self._shortened(text[: self._room]) if self.cuts(text) else text

    def note_cut(self, text: str) -> bool:
        """Return whether a text is cut, and log the first one that is."""
        cut = self.cuts(text)
        if cut and not self._logged:
            self._logged = True
            _log.warning(
                "policy.max_observation_tokens=%d cuts an observation of %s characters (%r …); further ones "
                "are counted, not named",
                self.limit,
                f"{len(text):,}",
                text[:40],
            )
        return cut

    def _encode_start(self, text: str) -> tuple[tuple[int, ...], bool]:
        ids = self._encode(text)
        return ids[: self.limit], self.limit is not None and len(ids) > self.limit

    def _shorten(self, text: str) -> str:
        """Find by halving how many characters take `limit` tokens."""
        kept, lost = 0, len(text)
        while lost - kept > 1:
            middle = (kept + lost) // 2
            if len(self._encode(text[:middle])) <= (self.limit or 0):
                kept = middle
            else:
                lost = middle
        return text[:kept]


_WORDS = re.compile("[\\w\u2581 ]*")  # sentencepiece writes spaces as \u2581


def markup_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of added tokens that are markup and not language.

    White space is language, and so are the plain words that domains add: those without the special flag that
    the chat template does not write.
    """
    template = str(tokenizer.chat_template or "")

    def is_language(name: str) -> bool:
        words = name.strip("\u2581 ")
        return name.isspace() or not words or (bool(_WORDS.fullmatch(name)) and words not in template)

    added = tokenizer.added_tokens_decoder.items()
    return special_ids(tokenizer) | {id for id, token in added if not is_language(token.content)}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that the tokenizer marks as special, which are never part of a reply's text."""
    flagged = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *flagged))


def decoder(tokenizer: PreTrainedTokenizerBase, control: Collection[int]) -> Callable[[Sequence[int]], str]:
    """Return a decoder that leaves out the ids in `control`."""

    def decode(ids: Sequence[int]) -> str:
        kept = [id for id in ids if id not in control]
        text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)

    return decode
