"""Conversations in text as turns in a policy's tokens, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from agentrl.data.conversations import Conversation, Exchange
from agentrl.data.trajectory import Turn
from agentrl.errors import ConfigError
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.dialogue import Dialogue, Prompt
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import make_dialogue

# What a prompt template can show of an environment beside its observations.
_OF_ENVIRONMENT = frozenset({"task", "actions", "max_steps", "instructions"})


class Transcriber:
    """Write conversations in the tokens of a policy.

    An environment's observations and commands become turns as in play. Messages are written by the chat
    template as they are, with nothing added; if they begin with the policy's own instructions, they are
    turns of its own dialogue. Without a chat template, all messages are turns.

    Args:
        dialogue: The dialogue of the policy.
        tokenizer: Its tokenizer.
        block: The `policy` block of the configuration.
    """

    def __init__(self, dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, block: PolicyConfig) -> None:
        self._dialogue, self._tokenizer, self._block = dialogue, tokenizer, block
        # Messages are not cut: what is too long as a whole is left out.
        self._uncut = make_dialogue(
            tokenizer,
            reply=block.reply,
            max_observation_tokens=None,
            stop_ids=dialogue.stop_ids,
            template_arguments=block.template_arguments,
            system_message=block.system_message,
        )
        self._verbatim: dict[str | None, ChatDialogue] = {}

    def turns(self, conversation: Conversation) -> tuple[Turn, ...]:
        """Return the turns of a conversation, without those after which nothing is learned.

        Raises:
            ConfigError: The policy cannot read or write it; the message names its place.
        """
        dialogue, exchanges = self._dialogue_of(conversation)
        encode = dialogue.encode_written if conversation.written else dialogue.encode_reply
        turns: list[Turn] = []
        history: list[tuple[str, tuple[int, ...]]] = []
        for exchange in exchanges:
            prompt, ids = dialogue.prompt(history, exchange.said), encode(exchange.reply)
            history.append((exchange.said, ids))
            zeros = (0.0,) * len(ids)
            turns.append(
                Turn(
                    observation=exchange.said,
                    action=dialogue.parse(ids).text,
                    prompt_ids=tuple(prompt.ids),
                    action_ids=ids,
                    logprobs=zeros,
                    entropies=zeros,
                    new_sequence=prompt.new_sequence,
                    trainable=exchange.learned,
                )
            )
        return learned_turns(turns)

    def is_own(self, conversation: Conversation) -> bool:
        """Return whether the messages are those of the policy's own dialogue."""
        own = self._uncut
        if not self._tokenizer.chat_template:
            return True
        begins = conversation.exchanges[0].said.startswith(f"{own.instructions}\n\n")
        return not self._dialogue.shown and begins and conversation.system == own.system_message

    def _dialogue_of(self, conversation: Conversation) -> tuple[Dialogue, Sequence[Exchange]]:
        exchanges, place = conversation.exchanges, conversation.place
        if conversation.played:
            self._check_played(place)
            return self._dialogue, exchanges
        if not self._tokenizer.chat_template and conversation.system is not None:
            raise ConfigError(
                f"{place}: has a system message, but the policy has no chat template, wanted user and "
                "assistant alone"
            )
        if self.is_own(conversation):
            if own := self._uncut.instructions:
                said = exchanges[0].said.removeprefix(f"{own}\n\n")
                exchanges = (replace(exchanges[0], said=said), *exchanges[1:])
            return self._uncut, exchanges
        try:
            return self._verbatim_dialogue(conversation.system), exchanges
        except ConfigError as error:
            raise ConfigError(f"{place}: has a system message; {error}") from error

    def _check_played(self, place: str) -> None:
        shown = _OF_ENVIRONMENT & self._dialogue.shown
        if shown:
            raise ConfigError(
                f"{place}: an episode without {', '.join(sorted(shown))}, which policy.prompt="
                f"{self._block.prompt} shows; wanted messages, as agentrl export --format messages writes"
            )

    def _verbatim_dialogue(self, system: str | None) -> ChatDialogue:
        if system in (None, self._block.system_message):
            if system not in self._verbatim:
                self._verbatim[system] = ChatDialogue(
                    self._tokenizer,
                    reply=self._block.reply,
                    max_observation_tokens=None,
                    instructions="",
                    stop_ids=self._dialogue.stop_ids,
                    template_arguments=self._block.template_arguments,
                    system_message=system,
                )
            return self._verbatim[system]
        assert system is not None
        return self._verbatim_dialogue(None).with_system(system)


def learned_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return turns without those that are only context, and that no later turn's sequence continues."""
    kept: list[Turn] = []
    for turn in reversed(turns):
        if turn.trainable or (kept and not kept[-1].new_sequence):
            kept.append(turn)
    return tuple(reversed(kept))


def conversations_of(dialogue: Dialogue, turns: Sequence[Turn]) -> list[tuple[Exchange, ...]]:
    """Return turns as messages: one conversation, or one for each turn whose prompt was written anew.

    Replies that were not understood, or not the policy's own, are not learned from.
    """
    exchanges = [
        Exchange(
            dialogue.user_message(
                Prompt(turn.prompt_ids, turn.new_sequence), turn.observation, first=place == 0
            ),
            dialogue.reply_text(turn.action_ids),
            turn.trainable and turn.valid,
        )
        for place, turn in enumerate(turns)
    ]
    return [(each,) for each in exchanges] if dialogue.starts_anew else [tuple(exchanges)]
