"""The text that a chat template writes around the turns of a dialogue, found by rendering placeholders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentrl.errors import ConfigError

Message = dict[str, Any]
Render = Callable[[list[Message]], str]

THINK, END_THINK = "<think>", "</think>"
REASONING_TAGS = (THINK, END_THINK)  # the tags that chat templates know
_BLOCK = re.compile(
    f"(?:{THINK}(?:(?!{THINK}).)*?)?{END_THINK}|{THINK}", re.DOTALL
)  # a block or a single tag
# The variables that every template is given.
_GIVEN = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
TEMPLATE_FAILURES = (TemplateError, ValueError, TypeError, KeyError)
SYSTEM_SLOT = 10**9  # a number that no text of an episode has
PROBED_TURNS = 4
# Some templates treat reasoning in earlier replies differently, so one of the probes has some.
PROBED_REPLIES = (
    "Reply{}Placeholder",
    f"{THINK}Thought{{0}}Placeholder{END_THINK}<action>Reply{{0}}Placeholder</action>",
)


@dataclass(frozen=True, slots=True)
class ChatPieces:
    """The template's own text around the turns.

    A dialogue is opening, observation, before_reply, reply, then between, observation, before_reply, reply
    for every further turn. `lead` is white space before a reply, which the model has to write as well.
    Where `appends` is False, earlier turns are written differently once later ones follow, and `between` only
    says how a reply ends. `begun` is the part of a reply that the prompt already writes, from its think
    tag on; `reply_prefix` is the part of it that an earlier reply must start with when it is rendered again.
    `before_later` stands for `before_reply` after every further observation, if that is another text.
    """

    opening: str
    before_reply: str
    lead: str
    between: str
    appends: bool
    begun: str = ""
    reply_prefix: str = ""
    before_later: str | None = None

    @property
    def opens(self) -> bool:
        """Return whether a reply begins inside a think block that the prompt has opened."""
        return bool(self.begun) and END_THINK not in self.begun


@dataclass(frozen=True, slots=True)
class ThinkBlock:
    """Text around the reasoning in a reply: opening, reasoning, closing, gap; `empty` has no reasoning."""

    opening: str = THINK
    closing: str = END_THINK
    gap: str = ""
    empty: str = THINK + END_THINK


def slot(number: int) -> str:
    """Return the placeholder of a text from outside, whose ids replace it after rendering.

    The text itself is never rendered, so it can become neither markup nor a placeholder.
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
    """Split a reply into the parts that a template sees, and the pieces behind placeholders between them.

    Templates trim replies, and some treat reasoning that ends in </think> differently. So a template sees the
    tags and the white space of a reply, and placeholders for everything else.

    Args:
        pieces: The pieces of the reply's text; each tag is a piece of its own.
        reasoning: Whether the template knows the tags; otherwise they are ordinary text.

    Returns:
        The parts, one more than there are placeholders, and for each placeholder the range of its pieces.

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


def check_system_role(render: Render) -> None:
    """Refuse a system message that a chat template would not write.

    Args:
        render: Renders a dialogue after a system message whose text is the slot `SYSTEM_SLOT`.

    Raises:
        ConfigError: If it is refused, left out or repeated.
    """
    try:
        times, reason = render(messages([slot(0)], [], "")).count(slot(SYSTEM_SLOT)), ""
    except TEMPLATE_FAILURES as error:
        times, reason = 0, f" ({error})"
    if times != 1:
        raise ConfigError(
            "policy.system_message is set, but the tokenizer's chat template has no system role: it writes "
            f"the message {times} times{reason}; wanted null, and the text in a template of policy.prompt"
        )


def messages(observations: Sequence[str], replies: Sequence[str], instructions: str) -> list[Message]:
    """Return the messages of a dialogue that waits for a reply; instructions precede all observations."""
    first = f"{instructions}\n\n{observations[0]}" if instructions else observations[0]
    written = [{"role": "user", "content": first}]
    for reply, observation in zip(replies, observations[1:], strict=True):
        written += [{"role": "assistant", "content": reply}, {"role": "user", "content": observation}]
    return written


def probe_template(render: Render) -> ChatPieces:
    """Find the fixed text around a turn, and whether a longer dialogue extends every shorter one.

    Raises:
        ConfigError: If the template fails, or changes the latest observation.
    """
    begun = begun_reply(render)
    opens = begun != "" and END_THINK not in begun
    # Where the prompt has opened a think block, a reply with reasoning only closes it.
    replies = [reply.removeprefix(THINK) if opens else reply for reply in PROBED_REPLIES]
    reply_prefix = ""
    probes = [_probe(render, reply) for reply in replies]
    if opens and not _balanced(probes[-1][-1]):
        whole = [_probe(render, begun + reply) for reply in replies]
        if _balanced(whole[-1][-1]):
            probes, reply_prefix = whole, begun
    opening, before_reply = text_around(probes[0][0], slot(0))
    before, _, after = probes[0][1].partition(replies[0].format(0))
    gap = before.removeprefix(probes[0][0])
    lead = gap if gap.isspace() else ""
    between = after.partition(slot(1))[0]
    pieces = ChatPieces(opening, before_reply, lead, between, True, begun, reply_prefix)
    appends = all(_extends(texts, reply, pieces) for texts, reply in zip(probes, replies, strict=True))
    return pieces if appends else replace(pieces, appends=False)


def begun_reply(render: Render) -> str:
    """Return the part of a reply that the prompt already writes, from its think tag on; "" without one.

    Raises:
        ConfigError: If the template fails, or changes an observation.
    """
    prompt = text_around(rendered(render, messages([slot(0)], [], "")), slot(0))[1]
    found = [block.start() for block in _BLOCK.finditer(prompt)]
    return prompt[found[-1] :] if found else ""


def think_block(finished: Render, silenced: Render) -> ThinkBlock:
    """Return how a template writes reasoning, or plain tags where rendering does not show it.

    Args:
        finished: Renders a dialogue that ends in a reply.
        silenced: Renders a dialogue that waits for a reply without reasoning, if the template supports it.
    """
    thought, reply = "ThoughtPlaceholder", "ReplyPlaceholder"
    block = ThinkBlock()
    with suppress(*TEMPLATE_FAILURES):
        found = _find_block(finished, THINK + thought + END_THINK + reply, thought, reply)
        if found is not None:
            opening, closing, gap = found
            block = ThinkBlock(opening, closing, gap, opening + closing + gap)
            empty = _find_block(finished, THINK + END_THINK + reply, "", reply)
            return block if empty is None else replace(block, empty="".join(empty))
    with suppress(ConfigError):
        empty_block = begun_reply(silenced)
        if empty_block.startswith(THINK) and END_THINK in empty_block:
            return replace(block, empty=empty_block)
    return block


def _find_block(finished: Render, content: str, thought: str, reply: str) -> tuple[str, str, str] | None:
    """Return opening, closing and gap around `thought` in a rendered reply; None if it is not there."""
    text = finished([*messages([slot(0)], [], ""), {"role": "assistant", "content": content}])
    pattern = rf"({THINK}\s*){thought}(\s*{END_THINK})(\s*){reply}"
    found = re.search(pattern, text.rpartition(slot(0))[2])
    return None if found is None else (found[1], found[2], found[3])


def check_arguments(template: str, arguments: Mapping[str, Any], given: Sequence[str] = ()) -> None:
    """Refuse arguments that a chat template never reads, or that are set for it anyway.

    Args:
        template: The template, in Jinja.
        arguments: The arguments of `policy.template_arguments`.
        given: Further names whose values are set for the template.

    Raises:
        ConfigError: Naming the first of them, and the arguments that the template reads.
    """
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    # transformers adds this tag to Jinja; it marks replies and reads nothing.
    plain = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", template)
    try:
        read = meta.find_undeclared_variables(environment.parse(plain))
    except TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template is not valid Jinja ({error})") from error
    known = read - _GIVEN - set(given) - set(environment.globals)
    for name in arguments:
        if name not in known:
            raise ConfigError(
                f"policy.template_arguments.{name}: the tokenizer's chat template never reads it "
                f"(it reads {', '.join(sorted(known)) or 'no such argument'})"
            )


def _balanced(text: str) -> bool:
    """Return whether the text between the first two observations closes every think block that it opens."""
    reply = text.partition(slot(0))[2].partition(slot(1))[0]
    return reply.count(THINK) == reply.count(END_THINK)


def _probe(render: Render, reply: str) -> list[str]:
    """Return the dialogue rendered with 1, 2, … observations."""
    slots = [slot(turn) for turn in range(PROBED_TURNS)]
    replies = [reply.format(turn) for turn in range(PROBED_TURNS)]
    texts = [rendered(render, messages(slots[: n + 1], replies[:n], "")) for n in range(PROBED_TURNS)]
    for turn, text in enumerate(texts):
        text_around(text, slot(turn))
    return texts


def rendered(render: Render, dialogue: list[Message]) -> str:
    """Render a dialogue; raise a `ConfigError` if the template fails."""
    try:
        return render(dialogue)
    except TEMPLATE_FAILURES as error:
        raise ConfigError(
            f"the tokenizer's chat template cannot write a dialogue of user and assistant turns ({error}); "
            "use a chat model, or give the tokenizer another chat_template"
        ) from error


def text_around(text: str, placeholder: str) -> tuple[str, str]:
    """Return the text before and after a placeholder; raise a `ConfigError` unless it occurs once."""
    parts = text.split(placeholder)
    if len(parts) != 2:
        raise ConfigError(
            f"the tokenizer's chat template writes the user's text {len(parts) - 1} times, wanted once and "
            "unchanged; give the tokenizer another chat_template"
        )
    return parts[0], parts[1]


def _extends(texts: list[str], reply: str, pieces: ChatPieces) -> bool:
    """Return whether each rendered dialogue is the one before it, plus a reply and the fixed pieces."""
    if texts[0] != pieces.opening + slot(0) + pieces.before_reply:
        return False
    return all(
        later
        == earlier + pieces.lead + reply.format(turn) + pieces.between + slot(turn + 1) + pieces.before_reply
        for turn, (earlier, later) in enumerate(pairwise(texts))
    )
