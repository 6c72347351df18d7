"""Earlier replies of a dialogue that is rendered again: what the template sees, and the sampled ids."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from agentrl.policy.chat import REASONING_TAGS, split_reply
from agentrl.policy.dialogue import without_end
from agentrl.policy.encoding import Encode

Ids = tuple[int, ...]
_REASONING_TAG = re.compile(f"({'|'.join(REASONING_TAGS)})")


class ReplySplitter:
    """Splits the ids of a reply into the text that a template has to see and the ids that it must not change.

    Args:
        encode: Encodes text from outside.
        decode: Decodes ids, without control tokens.
        added: The ids of all added tokens.
        control: The ids that are not part of a reply's text.
        stop_ids: The ids that end a reply.
        reasons: Whether the template knows the tags of reasoning.
    """

    def __init__(
        self,
        *,
        encode: Encode,
        decode: Callable[[Sequence[int]], str],
        added: Iterable[int],
        control: Collection[int],
        stop_ids: Collection[int],
        reasons: bool,
    ) -> None:
        self._encode, self._decode = encode, decode
        self._added, self._control = frozenset(added), control
        self._stop_ids, self._reasons = frozenset(stop_ids), reasons

    def split(self, reply: Ids) -> tuple[tuple[str, ...], tuple[Ids, ...]]:
        """Return the parts of a reply that the template sees, and the ids between them."""
        ids = [id for id in without_end(reply, self._stop_ids) if id not in self._control]
        pieces: list[tuple[str, Ids]] = []
        for run, added in split_at(ids, self._added):
            text = self._decode(run)
            if self._reasons and REASONING_TAGS[1] in text:  # the tag is spelled in ordinary tokens
                pieces += [(part, self._encode(part)) for part in _REASONING_TAG.split(text)]
            else:
                pieces.append((text, run))
            pieces.append((self._decode(added), added))
        shown, said = split_reply([text for text, _ in pieces], reasoning=self._reasons)
        return tuple(shown), tuple(self._trim([pieces[place] for place in places]) for places in said)

    def _trim(self, pieces: Sequence[tuple[str, Ids]]) -> Ids:
        """Return the ids of pieces of a reply, without the white space around all of them."""
        words = [place for place, (text, _) in enumerate(pieces) if text.strip()]
        kept: list[int] = []
        for place in range(words[0], words[-1] + 1):
            text, ids = pieces[place]
            wanted = text.lstrip() if place == words[0] else text
            wanted = wanted.rstrip() if place == words[-1] else wanted
            kept += ids if wanted == text else self._strip_space(ids, wanted)
        return tuple(kept)

    def _strip_space(self, ids: Ids, wanted: str) -> Ids:
        """Return the ids without surrounding white space; encode `wanted` anew if a token mixes the two."""
        start, end = 0, len(ids)
        while start < end and not self._decode(ids[start : start + 1]).strip():
            start += 1
        while start < end and not self._decode(ids[end - 1 : end]).strip():
            end -= 1
        return ids[start:end] if self._decode(ids[start:end]) == wanted else self._encode(wanted)


def split_at(ids: Iterable[int], separators: Collection[int]) -> list[tuple[Ids, Ids]]:
    """Split ids into (run, separator after it); the last run has none.

    >>> split_at((5, 1, 6, 7), {1})
    [((5,), (1,)), ((6, 7), ())]
    """
    parts: list[tuple[Ids, Ids]] = []
    run: list[int] = []
    for id in ids:
        if id in separators:
            parts.append((tuple(run), (id,)))
            run = []
        else:
            run.append(id)
    return [*parts, (tuple(run), ())]
