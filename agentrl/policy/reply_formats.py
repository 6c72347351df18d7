"""Formats of a reply, and how the command in it is found."""

import re
from dataclasses import dataclass

from agentrl.policy.chat import REASONING_TAGS
from agentrl.policy.prompt import ReplyWords

REPLY_TAGS = (*REASONING_TAGS, "<action>", "</action>")  # the tags of the reply formats


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """Format in which a reply contains its command."""

    asks: str  # what it asks for, after "Each turn you"
    wrap: str  # the text around a command, with {} in its place
    pattern: re.Pattern[str]  # matches the whole reply, with a group `command`
    tagged: bool
    thinks: bool = False  # whether the reply reasons in a think block before the command

    @property
    def instructions(self) -> str:
        """Return the text before the first observation."""
        return f"{_TASK} {self.asks}"

    @property
    def words(self) -> ReplyWords:
        """Return what a prompt template can say of the format."""
        before, after = self.wrap.split("{}")
        return ReplyWords(self.asks, before, after)


_TASK = "You act in a text environment to solve the task it gives you. Each turn you read what happened and"
REPLY_FORMATS: dict[str, ReplyFormat] = {
    "plain": ReplyFormat(
        "reply with your next command and nothing else.",
        "{}",
        re.compile(r"(?P<command>.*)", re.DOTALL),
        False,
    ),
    "action_tags": ReplyFormat(
        "reply with your next command between <action> and </action>.",
        "<action>{}</action>",
        re.compile(
            r"(?:(?!<action>).)*<action>(?P<command>(?:(?!<action>).)*?)</action>(?:(?!<action>).)*",
            re.DOTALL,
        ),
        True,
    ),
    "think_action": ReplyFormat(
        "reply with your reasoning between <think> and </think>, then your next command between <action> and "
        "</action>.",
        "<action>{}</action>",
        # The opening tag may be part of the template's generation prompt.
        re.compile(
            r"(?:<think>)?(?:(?!</think>).)*</think>\s*<action>(?P<command>(?:(?!</?action>).)*)</action>",
            re.DOTALL,
        ),
        True,
        thinks=True,
    ),
}
# The rest of think_action where the prompt already holds a whole think block.
AFTER_THOUGHTS = ReplyFormat(
    REPLY_FORMATS["action_tags"].asks,
    "<action>{}</action>",
    re.compile(r"<action>(?P<command>(?:(?!</?action>).)*)</action>", re.DOTALL),
    True,
)
