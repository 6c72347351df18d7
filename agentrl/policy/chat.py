"""What a chat template writes around the turns of a dialogue, found by rendering placeholders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from jinja2 import TemplateError

from agentrl.errors import ConfigError

Message = dict[str, str]
Render = Callable[[list[Message]], str]

REASONING_TAGS = ("<think>", "</think>")  # that templates know
INSTRUCTIONS_SLOT = 10**9  # its number, which no text of an episode has
PROBED_TURNS = 4
# Templates are known to treat reasoning in earlier replies apart, so one of the probes has some.
PROBED_REPLIES = (
    "Reply{}Placeholder",
    "<think>Thought{0}Placeholder</think><action>Reply{0}Placeholder</action>",
)


@dataclass(frozen=True, slots=True)
class ChatPieces:
    """The template's own text around the turns.

    A dialogue is opening, observation, before_reply, reply, then between, observation, before_reply, reply
    for every further turn. `lead` is white space that the template writes before a reply, as the model must.
    Where `appends` is False, earlier turns are written differently once later ones follow; `between` then
    only says how a reply ends.
    """

    opening: str
    before_reply: str
    lead: str
    between: str
    appends: bool


def slot(number: int) -> str:
    """Return the placeholder of a text from outside, which is put in after rendering: it is never markup.

    What is rendered holds no text from outside, so none can spell a placeholder either.
    """
    return f"Observation{number}Placeholder"


def split_slots(text: str) -> list[tuple[str, int | None]]:
    """Split rendered text into (template text, number of the placeholder after it), the last with None.

    >>> split_slots("<u>Observation0Placeholder</u>")
    [('<u>', 0), ('</u>', None)]
    """
    parts = re.split(r"Observation(\d+)Placeholder", text)
    numbers = [int(number) for number in parts[1::2]]
    return list(zip(parts[::2], [*numbers, None], strict=True))


def split_reply(pieces: Sequence[str], *, reasoning: bool = True) -> tuple[list[str], list[range]]:
    """Split a reply into what a template is shown of it, and the pieces that stand between those parts.

    Templates trim replies, and some treat the reasoning that ends in </think> apart: they are shown its tags
    and white space, and a placeholder for everything else.

    Args:
        pieces: of the reply's text; a tag is one of its own.
        reasoning: whether the template knows the tags; else they are text like any other.

    Returns:
        The parts, one more than there are placeholders, and the places of what these stand for.

    >>> split_reply(["<think>", "why so", "</think>", " go ", "<b>"])
    (['<think>', '</think> ', ''], [range(1, 2), range(3, 5)])
    """
    start, end = REASONING_TAGS
    ends = (place for place, piece in enumerate(pieces) if piece == end and reasoning)
    thought = max(ends, default=-1)
    tags = [place for place in range(thought + 1) if pieces[place] in (start, end)]
    shown, said = [""], []
    for first, last in pairwise([-1, *tags, len(pieces)]):
        places = range(first + 1, last)
        text = "".join(pieces[place] for place in places)
        if words := text.strip():
            before, _, after = text.partition(words)
            shown[-1] += before
            shown.append(after)
            said.append(places)
        else:
            shown[-1] += text
        shown[-1] += "".join(pieces[last : last + 1])
    shown[0], shown[-1] = shown[0].lstrip(), shown[-1].rstrip()
    return shown, said


def messages(observations: Sequence[str], replies: Sequence[str], instructions: str) -> list[Message]:
    """A dialogue that waits for a reply; the instructions stand before the first observation."""
    first = f"{instructions}\n\n{observations[0]}" if instructions else observations[0]
    written = [{"role": "user", "content": first}]
    for reply, observation in zip(replies, observations[1:], strict=True):
        written += [{"role": "assistant", "content": reply}, {"role": "user", "content": observation}]
    return written


def probe_template(render: Render, instructions: str) -> ChatPieces:
    """Find the fixed pieces around a turn, and whether a rendered dialogue begins with every earlier one.

    Raises:
        ConfigError: if the template fails, or does not write the latest observation as it is given.
    """
    probes = [_probe(render, reply, instructions) for reply in PROBED_REPLIES]
    opening, before_reply = _around(probes[0][0], slot(0))
    before, _, after = probes[0][1].partition(PROBED_REPLIES[0].format(0))
    gap = before.removeprefix(probes[0][0])
    lead = gap if gap.isspace() else ""
    pieces = ChatPieces(opening, before_reply, lead, after.partition(slot(1))[0], appends=True)
    appends = all(_extends(texts, reply, pieces) for texts, reply in zip(probes, PROBED_REPLIES, strict=True))
    return pieces if appends else replace(pieces, appends=False)


def _probe(render: Render, reply: str, instructions: str) -> list[str]:
    """The dialogue rendered after 1, 2, … turns."""
    slots = [slot(turn) for turn in range(PROBED_TURNS)]
    replies = [reply.format(turn) for turn in range(PROBED_TURNS)]
    try:
        texts = [render(messages(slots[: n + 1], replies[:n], instructions)) for n in range(PROBED_TURNS)]
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"the tokenizer's chat template cannot write a dialogue of user and assistant turns ({error}); "
            "use a chat model, or give the tokenizer another chat_template"
        ) from error
    for turn, text in enumerate(texts):
        _around(text, slot(turn))
    return texts


def _around(text: str, placeholder: str) -> tuple[str, str]:
    parts = text.split(placeholder)
    if len(parts) != 2:
        raise ConfigError(
            f"the tokenizer's chat template wrote the user's text {len(parts) - 1} times, wanted once and "
            "unchanged; give the tokenizer another chat_template"
        )
    return parts[0], parts[1]


def _extends(texts: list[str], reply: str, pieces: ChatPieces) -> bool:
    if texts[0] != pieces.opening + slot(0) + pieces.before_reply:
        return False
    return all(
        later
        == earlier + pieces.lead + reply.format(turn) + pieces.between + slot(turn + 1) + pieces.before_reply
        for turn, (earlier, later) in enumerate(pairwise(texts))
    )
