"""Reasoning before a choice, generated freely until an ending text; standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ending:
    """The text that ends reasoning, however it is split into tokens.

    Args:
        text: The ending, such as "</think>".
        pieces: The texts of all tokens that can hold a part of it, by id; see `pieces_of`.
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
    """Form of a reply that reasons first: an opening, the reasoning, a lead, then one of the choices.

    Reasoning is any tokens until their text contains the ending, a stop id comes, or no room is left. In the
    last two cases `closing` is written after it. Then follow a lead and the choice.

    Args:
        opening: The ids before the reasoning.
        ending: The text that ends the reasoning.
        closing: The ids written in place of the ending where the reasoning did not reach it.
        leads: The ids before the choice, by the text after the ending in the last token of the reasoning; ""
            is among the keys and stands for every text that is not.
    """

    opening: tuple[int, ...]
    ending: Ending
    closing: tuple[int, ...]
    leads: Mapping[str, tuple[int, ...]]

    @property
    def cut(self) -> tuple[int, ...]:
        """Return the ids written after reasoning that did not reach its ending."""
        return (*self.closing, *self.leads[""])

    @property
    def written(self) -> int:
        """Return the largest number of forced tokens between the reasoning and the choice."""
        return len(self.closing) + max(map(len, self.leads.values()))

    def room(self, most: int, choices: Iterable[Sequence[int]]) -> int:
        """Return the tokens left for reasoning in a reply of `most`, whatever its choice; may be negative."""
        return most - len(self.opening) - self.written - max(map(len, choices))

    def within(self, vocabulary: int) -> bool:
        """Return whether all ids of `closing` and `leads` are in a vocabulary of this size."""
        written = (*self.closing, *(token for lead in self.leads.values() for token in lead))
        return all(0 <= token < vocabulary for token in written)


class EndingMatcher:
    r"""Finds the ending in a stream of tokens.

    >>> matcher = EndingMatcher(Ending("</t>", {1: "</", 2: "t", 3: ">\n"}))
    >>> [matcher.take(token) for token in (2, 1, 7, 1, 2, 3)]
    [None, None, None, None, None, '\n']
    """

    __slots__ = ("_ending", "_seen")

    def __init__(self, ending: Ending, begun: Sequence[int] = ()) -> None:
        self._ending = ending
        self._seen = ""  # the end of the text so far that may start the ending
        for token in begun[-len(ending.text) :]:  # each piece has at least one character
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
    """Reasoning that is being generated.

    Args:
        thinking: How the reasoning ends.
        limit: The largest number of tokens to generate, at least 1.
        stop_ids: The ids that cut it short.
        begun: The tokens that it already has.

    Attributes:
        left: The number of tokens that may still be generated.
    """

    __slots__ = ("_matcher", "_stop_ids", "_thinking", "left")

    def __init__(
        self, thinking: Thinking, limit: int, stop_ids: Collection[int], begun: Sequence[int] = ()
    ) -> None:
        self._thinking, self.left, self._stop_ids = thinking, limit, stop_ids
        self._matcher = EndingMatcher(thinking.ending, begun)

    @property
    def cut(self) -> tuple[int, ...]:
        """Return the ids between the reasoning and the choice if it is ended here."""
        return self._thinking.cut

    def take(self, token: int) -> tuple[int, ...] | None:
        """Add a token; return the ids between the reasoning and the choice if it was the last, else None."""
        self.left -= 1
        overhang = self._matcher.take(token)
        if overhang is not None:
            leads = self._thinking.leads
            return leads.get(overhang, leads[""])
        return self._thinking.cut if self.left < 1 or token in self._stop_ids else None


def pieces_of(end: str, texts: Mapping[int, str]) -> dict[int, str]:
    """Return the tokens that can hold a part of `end`: its start, its middle or its completion.

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
    """Return the longest suffix of `text` that is a proper prefix of `end`."""
    sizes = range(min(len(text), len(end) - 1), 0, -1)
    return next((text[-size:] for size in sizes if end.startswith(text[-size:])), "")
