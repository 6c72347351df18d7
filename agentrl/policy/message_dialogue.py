"""Dialogues as chat messages, for a server that renders and tokenizes them itself; does not import torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from agentrl.errors import ConfigError
from agentrl.policy.chat import END_THINK, THINK, Message, messages
from agentrl.policy.dialogue import ParsedReply, Wording
from agentrl.policy.prompt import Example, PromptTemplate, load_prompt, task_of
from agentrl.policy.reply_formats import REPLY_FORMATS
from agentrl.policy.settings import PolicyConfig

CHARS_PER_TOKEN = 4  # a rule of thumb for English: the tokens of a server cannot be counted here


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn of a dialogue: what was observed, the whole text of the reply, and the command in it."""

    observation: str
    reply: str
    command: str


class MessageDialogue:
    """The dialogue of a `ChatDialogue` before a chat template renders it: the same messages, as text.

    Args:
        reply: The format of replies.
        prompt: The template of the user's messages; None writes the instructions, then the observations
            alone.
        system_message: The text of a system message; None writes none.
        max_observation_tokens: The number of tokens after which an observation is cut, at `CHARS_PER_TOKEN`
            characters each; None cuts none.

    Attributes:
        wording: The fixed text of the messages, and its hash.
    """

    def __init__(
        self,
        *,
        reply: str = "plain",
        prompt: PromptTemplate | None = None,
        system_message: str | None = None,
        max_observation_tokens: int | None = None,
    ) -> None:
        if reply not in REPLY_FORMATS:
            known = ", ".join(REPLY_FORMATS)
            raise ConfigError(
                f"policy.reply is {reply!r}, wanted one of {known} for a model on a chat server"
            )
        self._format = REPLY_FORMATS[reply]
        self._prompt = prompt
        if prompt is not None:
            prompt.check(self._format.words)
        self._instructions = self._format.instructions if prompt is None else ""
        self._system = system_message
        self._limit = None if max_observation_tokens is None else CHARS_PER_TOKEN * max_observation_tokens
        self.wording = self._describe()

    def messages(self, history: Sequence[Exchange], observation: str) -> list[Message]:
        """Return the messages after which the reply to an observation follows."""
        shown = history if self._prompt is None or self._prompt.history is None else ()
        said = [self._write(history[:turn], exchange.observation) for turn, exchange in enumerate(shown)]
        said.append(self._write(history, observation))
        written = messages(said, [exchange.reply for exchange in shown], self._instructions)
        if self._system is None:
            return written
        return [{"role": "system", "content": self._system}, *written]

    def parse(self, reply: str, *, complete: bool) -> ParsedReply:
        """Return the command in a reply.

        Args:
            reply: The text of the reply.
            complete: Whether the model ended the reply itself.
        """
        text = reply.strip()
        said = text
        # A closing tag alone: the chat template has opened the think block.
        if not self._format.tagged and END_THINK in text and THINK not in text:
            said = text.partition(END_THINK)[2].strip()
        return self._format.read(said, complete) or ParsedReply(text, valid=False)

    def with_reasoning(self, reply: str, reasoning: str) -> str:
        """Return a reply with the reasoning that the server took out of it, if the format asks for it."""
        if not self._format.thinks or not reasoning or END_THINK in reply:
            return reply
        return f"{THINK}{reasoning}{END_THINK}{reply}"

    def cuts(self, text: str) -> bool:
        """Return whether an observation is cut."""
        return self._limit is not None and len(text) > self._limit

    def _shorten(self, text: str) -> str:
        return text[: self._limit]

    def _write(self, history: Sequence[Exchange], observation: str) -> str:
        """Return the user's message of a turn."""
        if self._prompt is not None:
            past = [(exchange.observation, exchange.command) for exchange in history]
            pieces = self._prompt.write(past, observation, self._format.words, self._shorten)
            return "".join(text for text, _ in pieces)
        task, short = None if history else task_of(observation), self._shorten(observation)
        if task is None or task in short or not self.cuts(observation):
            return short
        before = self._shorten(observation.partition(task)[0].rstrip())
        return f"{before}\n{task}" if before else task

    def _describe(self) -> Wording:
        opening = "\n\n".join(filter(None, (self._system, self._instructions)))
        prompt = self._prompt
        parts = () if prompt is None else (prompt.source, prompt.history, prompt.examples)
        examples = [] if prompt is None else [[shown.task, shown.turns] for shown in prompt.examples]
        content = [self._system, self._instructions, *parts[:2], examples, self._format.asks]
        sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return Wording(opening, "", "", sha256, None, *parts)


def configured_messages(block: PolicyConfig, examples: Sequence[Example] = ()) -> MessageDialogue:
    """Create the dialogue that the `policy` block of a configuration describes.

    Args:
        block: The block.
        examples: The solved examples that its prompt shows.
    """
    return MessageDialogue(
        reply=block.reply,
        prompt=load_prompt(block.prompt, block.history, examples),
        system_message=block.system_message,
        max_observation_tokens=block.max_observation_tokens,
    )
