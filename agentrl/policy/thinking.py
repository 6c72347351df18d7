"""Reasoning before a choice: generated freely until the text of its tokens ends it; standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ending:
    """The text with which reasoning ends, however it is cut into tokens.

    Args:
        text: that ends it.
        pieces: the text of every token that may stand for a part of it; see `pieces_of`.
    """

    text: str
    pieces: Mapping[int, str]

    @property
    def overhangs(self) -> set[str]:
        """Return every text that a token may have after the ending that it completes."""
        begins = [self.text[:size] for size in range(len(self.text))]
        cut = ((begin + piece).partition(self.text) for begin in begins for piece in self.pieces.values())
        return {overhang for _, found, overhang in cut if found}


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a reply thinks before it chooses: opening, thoughts, what leads over, then one of the choices.

    Thoughts are any tokens until their text has the ending, a stop id, or as many as there is room for. In
    the last two cases `closing` is written after them. Then comes a lead, and then the choice.

    Args:
        opening: written before the thoughts.
        ending: of the thoughts.
        closing: stands for the ending where the thoughts did not come to it.
        leads: Ids written before the choice, by the text that follows the ending in the last token of the
            thoughts; "" is a key and stands for every text that is not.
    """

    opening: tuple[int, ...]
    ending: Ending
    closing: tuple[int, ...]
    leads: Mapping[str, tuple[int, ...]]

    @property
    def cut(self) -> tuple[int, ...]:
        """What is written after thoughts that did not come to their ending."""
        return (*self.closing, *self.leads[""])

    @property
    def written(self) -> int:
        """Tokens that may be written between the thoughts and the choice."""
        return len(self.closing) + max(map(len, self.leads.values()))

    def room(self, most: int, choices: Iterable[Sequence[int]]) -> int:
        """Tokens left for thoughts in a reply of `most`, whichever choice it ends in; may be below 0."""
        return most - len(self.opening) - self.written - max(map(len, choices))

    def within(self, vocabulary: int) -> bool:
        """Whether a model with so many ids knows all that is written."""
        written = (*self.closing, *(token for lead in self.leads.values() for token in lead))
        return all(0 <= token < vocabulary for token in written)


class EndingMatcher:
    r"""Looks for the ending in tokens as they come.

    >>> matcher = EndingMatcher(Ending("</t>", {1: "</", 2: "t", 3: ">\n"}))
    >>> [matcher.take(token) for token in (2, 1, 7, 1, 2, 3)]
    [None, None, None, None, None, '\n']
    """

    __slots__ = ("_ending", "_seen")

    def __init__(self, ending: Ending, begun: Sequence[int] = ()) -> None:
        self._ending = ending
        self._seen = ""  # what may become the ending
        for token in begun[-len(ending.text) :]:  # each piece has a character at least
            self.take(token)

    def take(self, token: int) -> str | None:
        """Read a token and return its text after the ending; None while the ending has not come."""
        piece = self._ending.pieces.get(token)
        if piece is None:
            self._seen = ""
            return None
        text = self._seen + piece
        _, found, overhang = text.partition(self._ending.text)
        if found:
            self._seen = ""
            return overhang
        self._seen = _partial_match(text, self._ending.text)
        return None


class Thought:
    """Thoughts in the making.

    Args:
        thinking: how they end.
        limit: tokens that may be added, at least 1.
        stop_ids: that cut them short.
        begun: tokens that they have already.

    Attributes:
        left: tokens that may still be added.
    """

    __slots__ = ("_matcher", "_stop_ids", "_thinking", "left")

    def __init__(
        self, thinking: Thinking, limit: int, stop_ids: Collection[int], begun: Sequence[int] = ()
    ) -> None:
        self._thinking, self.left, self._stop_ids = thinking, limit, stop_ids
        self._matcher = EndingMatcher(thinking.ending, begun)

    def take(self, token: int) -> tuple[int, ...] | None:
        """What is written between a last thought and the choice; None where the token was not the last."""
        self.left -= 1
        overhang = self._matcher.take(token)
        if overhang is not None:
            leads = self._thinking.leads
            return leads.get(overhang, leads[""])
        return self._thinking.cut if self.left < 1 or token in self._stop_ids else None


def pieces_of(end: str, texts: Mapping[int, str]) -> dict[int, str]:
    """Those of some tokens that can stand for a part of `end`: it may begin, go on or be complete in them.

    >>> pieces_of("</t>", {1: "<", 2: "t", 3: "go", 4: "> <", 5: "to", 6: "a</t>b", 7: ""})
    {1: '<', 2: 't', 4: '> <', 6: 'a</t>b'}
    """
    begins = [end[:size] for size in range(len(end))]
    return {
        token: text
        for token, text in texts.items()
        if text and any(end in begin + text or _partial_match(begin + text, end) for begin in begins)
    }


def _partial_match(text: str, end: str) -> str:
    """The longest part at the end of `text` that begins `end` and is not all of it."""
    sizes = range(min(len(text), len(end) - 1), 0, -1)
    return next((text[-size:] for size in sizes if end.startswith(text[-size:])), "")
