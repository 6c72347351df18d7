"""Menus: the admissible replies to a request, and the thoughts that may come before the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from agentrl.policy.thinking import Thinking, Thought
from agentrl.policy.trie import admissible_replies

if TYPE_CHECKING:
    from agentrl.policy.chat_dialogue import ChatDialogue
    from agentrl.policy.dialogue import Dialogue


@dataclass(frozen=True, slots=True)
class Menu:
    """The admissible actions of a reply, and how the reply begins.

    Args:
        texts: The admissible actions, by the tokens in which the reply ends.
        prefix: The first tokens of the reply, which are given.
        thoughts: The tokens of `prefix` that are unfinished thoughts.
        thinking: How the reply thinks before its choice; None if it does not, or if its thoughts are over.
    """

    texts: dict[tuple[int, ...], str]
    prefix: tuple[int, ...] = ()
    thoughts: tuple[int, ...] = ()
    thinking: Thinking | None = None

    def chosen(self, ids: tuple[int, ...]) -> str | None:
        """Return the action in which the tokens after `prefix` end; None if they end in no action."""
        if self.thinking is None:
            return self.texts.get(ids)
        # One action may end another, but no action begins in the text before it: the longest match is it.
        found = max((end for end in self.texts if ids[-len(end) :] == end), key=len, default=())
        return self.texts.get(found)

    def reply_tokens(self, max_tokens: int) -> int:
        """Return the maximum number of tokens of a reply, of which free thoughts have `max_tokens`."""
        longest = len(self.prefix) + max(map(len, self.texts))
        if self.thinking is None:
            return longest
        return max(longest + self.thinking.written, max_tokens)


def build_menu(
    dialogue: "Dialogue",
    thinking: Thinking | None,
    actions: Sequence[str],
    begun: tuple[int, ...],
    max_tokens: int,
) -> Menu:
    """Return the menu of a reply.

    Args:
        dialogue: The dialogue that encodes actions.
        thinking: How replies think before their choice; None if they do not.
        actions: The admissible actions.
        begun: The first tokens of the reply, taken over from a parent.
        max_tokens: The maximum number of tokens of a reply with thoughts.
    """
    if thinking is None:
        texts = admissible_replies(actions, dialogue.encode_reply)
        return Menu(_continuations(texts, (), begun))  # the trie forces the tokens of `begun`
    texts = admissible_replies(actions, cast("ChatDialogue", dialogue).encode_choice)
    opening = thinking.opening
    prefix = begun if len(begun) > len(opening) else opening
    thoughts = prefix[len(opening) :]
    limit = thinking.room(max_tokens, texts)
    if limit < 1:
        return Menu(_continuations(texts, thinking.cut, thoughts), opening)
    # Replay the thoughts of the parent, to see whether they are finished within what was taken over.
    thought = Thought(thinking, limit, dialogue.stop_ids)
    for position, token in enumerate(prefix):
        if position < len(opening):
            continue
        written = thought.take(token)
        if written is not None:
            return Menu(_continuations(texts, written, prefix[position + 1 :]), prefix[: position + 1])
    return Menu(texts, prefix, thoughts, thinking)


def _continuations(
    texts: Mapping[tuple[int, ...], str], written: tuple[int, ...], begun: tuple[int, ...]
) -> dict[tuple[int, ...], str]:
    """Put `written` before the tokens of each text, and return those that begin with `begun`."""
    written_out = (((*written, *ids), text) for ids, text in texts.items())
    return {ids: text for ids, text in written_out if ids[: len(begun)] == begun}
