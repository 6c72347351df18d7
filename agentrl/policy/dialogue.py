"""Dialogues between an environment and a policy, as token ids: what every format of turns provides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from agentrl.env.briefing import Briefing
from agentrl.policy.prompt import Example

History = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids that the policy reads before a reply.

    Args:
        ids: Ids to append to the sequence, or all of its ids when `new_sequence`.
        new_sequence: Whether the ids start a new sequence.
        cut: Whether the observation to reply to was too long, and is cut.
    """

    ids: tuple[int, ...]
    new_sequence: bool
    cut: bool = False


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """The command in a reply.

    Without one, `valid` is False and `text` is the whole reply or, of a tool call, what is wrong with it.
    """

    text: str
    valid: bool


@dataclass(frozen=True, slots=True)
class Wording:
    """The fixed text around the turns of an episode, which a run records.

    Args:
        opening: The text before the first observation, with the date if the chat template writes one.
        before_reply: The text after an observation.
        between: The text after a reply.
        sha256: The hash of the token ids of the three, and of the parts below where a template writes the
            messages.
        template_sha256: The hash of the chat template; None without one.
        prompt: The text of the prompt template; None for `plain` in a growing dialogue.
        history: The number of turns that a prompt of such a template shows; None for the whole dialogue.
        examples: The solved examples that it shows.
    """

    opening: str
    before_reply: str
    between: str
    sha256: str
    template_sha256: str | None = None
    prompt: str | None = None
    history: int | None = None
    examples: tuple[Example, ...] = ()


class Dialogue(Protocol):
    """Way of writing an episode as tokens.

    A dialogue whose replies may reason before their choice also has `thinking` and `encode_choice`, like
    `ChatDialogue`. What is below `parse` is for conversations in text, see `agentrl.policy.transcripts`.
    """

    stop_ids: frozenset[int]
    wording: Wording

    def prompt(self, history: History, observation: str) -> Prompt:
        """Return the prompt after `history`, the (observation, reply ids) of the turns so far.

        An observation may be an `agentrl.policy.prompt.Observation`, which says more than its text.
        """
        ...

    def for_episode(self, briefing: Briefing) -> Self:
        """Return the dialogue of an episode, which knows the tools of its environment."""
        ...

    def unsaid(self, actions: Iterable[str]) -> str | None:
        """Return the first of some actions that no reply can give; None if there is none."""
        ...

    def encode_reply(self, text: str) -> tuple[int, ...]:
        """Return the ids of the reply that gives the command `text`, with its stop id."""
        ...

    def parse(self, ids: Sequence[int]) -> ParsedReply:
        """Return the command in a reply."""
        ...

    @property
    def instructions(self) -> str:
        """Return the text before the first observation."""
        ...

    @property
    def system_message(self) -> str | None:
        """Return the text of the system message."""
        ...

    @property
    def starts_anew(self) -> bool:
        """Return whether every prompt begins a conversation of its own, which shows a few turns."""
        ...

    @property
    def shown(self) -> frozenset[str]:
        """Return the names of what a prompt template shows; empty without one."""
        ...

    def encode_written(self, text: str) -> tuple[int, ...]:
        """Return the ids of a reply that is given as it is written, with its stop id."""
        ...

    def reply_text(self, ids: Sequence[int]) -> str:
        """Return a reply as it is written."""
        ...

    def user_message(self, prompt: Prompt, observation: str, *, first: bool) -> str:
        """Return the text of the user's message that a prompt ends with, cuts included."""
        ...


def sha256_of(ids: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of lists of token ids, as hex digits."""
    return hashlib.sha256(json.dumps([list(part) for part in ids]).encode()).hexdigest()


def without_end(ids: tuple[int, ...], stop_ids: Collection[int]) -> tuple[int, ...]:
    """Return the ids of a reply without the stop id at its end, if there is one."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
