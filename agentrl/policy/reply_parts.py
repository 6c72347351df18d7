"""The parts of a reply that plans: its switch, its subgoal and its action, by token."""

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SWITCH = re.compile(r"<switch>\s*(KEEP|SWITCH)\s*</switch>")
_SUBGOAL = re.compile(r"<subgoal>((?:(?!<subgoal>).)*?)</subgoal>", re.DOTALL)


def reply_parts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Mapping[str, Any]:
    """Return where the parts of a reply are, and what they say; JSON values.

    A token belongs to the part in which its text begins. The action reaches from the end of the subgoal, or
    from its own tag, to the end of the reply; without its tag, it is the whole reply. A reply without a
    switch keeps its subgoal.

    Args:
        ids: The tokens of the reply.
        decode: Maps tokens to their text.

    Returns:
        `action`, and where they are there `switch` and `subgoal`, each as [first token, token after it];
        `switched`, whether the reply says SWITCH; and `goal`, the text of the subgoal.

    >>> pieces = ["<switch>", "SWITCH", "</switch><", "subgoal>", "find", "</subgoal>", "<action>", "go", "."]
    >>> reply_parts(range(9), lambda ids: "".join(pieces[id] for id in ids))["subgoal"]
    [3, 6]
    """
    text = decode(ids)
    switch, subgoal = _SWITCH.search(text), _SUBGOAL.search(text)
    found: dict[str, Any] = {"switched": switch is not None and switch[1] == "SWITCH"}

    def token_at(offset: int) -> int:
        """Return the first token whose text begins at or after a place in the text."""
        before = bisect_right(range(len(ids)), offset, key=lambda count: len(decode(ids[:count])))
        begins = before > 0 and len(decode(ids[: before - 1])) == offset
        return before - 1 if begins else before

    def span(start: int, end: int) -> list[int]:
        return [token_at(start), token_at(end)]

    if switch is not None:
        found["switch"] = span(*switch.span())
    if subgoal is not None:
        found["subgoal"], found["goal"] = span(*subgoal.span()), subgoal[1].strip()
    begins = text.find("<action>")
    if subgoal is not None and subgoal.end() <= begins:
        begins = subgoal.end()
    found["action"] = [token_at(begins) if begins >= 0 else 0, len(ids)]
    return found
