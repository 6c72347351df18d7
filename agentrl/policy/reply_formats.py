"""Formats of a reply, and how the command in it is found."""

import re
from dataclasses import dataclass

from agentrl.policy.chat import REASONING_TAGS, ChatPieces, Render, probe_template
from agentrl.policy.dialogue import ParsedReply
from agentrl.policy.prompt import ReplyWords

PLAN_TAGS = ("<switch>", "</switch>", "<subgoal>", "</subgoal>")
REPLY_TAGS = (*REASONING_TAGS, *PLAN_TAGS, "<action>", "</action>")  # the tags of the reply formats
TOOL_CALL = "tool_call"  # the format that the chat template decides on; see `agentrl.policy.tool_calls`


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """Format in which a reply contains its command."""

    asks: str  # what it asks for, after "Each turn you"
    wrap: str  # the text around a command, with {} in its place
    pattern: re.Pattern[str]  # matches the whole reply, with a group `command`
    tagged: bool
    thinks: bool = False  # whether the reply reasons in a think block before the command
    plan: str = ""  # the plan before the command of a reply that has none of its own; "" if none is asked for

    @property
    def instructions(self) -> str:
        """Return the text before the first observation."""
        return f"{TASK} {self.asks}"

    @property
    def words(self) -> ReplyWords:
        """Return what a prompt template can say of the format."""
        before, after = self.wrap.split("{}")
        return ReplyWords(self.asks, before, after)

    def around(self, command: str) -> tuple[str, str, str]:
        """Return the text before a command, the command as it is written, and the text after it."""
        return self.words.around(command)

    def read(self, said: str, ended: bool) -> ParsedReply | None:
        """Return the command in a reply; None if there is none.

        Args:
            said: The reply.
            ended: Whether it is complete, rather than cut off.
        """
        found = self.pattern.fullmatch(said)
        # Tags show that a command is complete, but a plain reply that was cut off may hold half of one.
        if found is None or not (self.tagged or ended) or not found["command"].strip():
            return None
        return ParsedReply(found["command"].strip(), valid=True)

    def probe(self, render: Render) -> ChatPieces:
        """Find the fixed text around a turn; see `agentrl.policy.chat.probe_template`."""
        return probe_template(render)


TASK = "You act in a text environment to solve the task it gives you. Each turn you read what happened and"
_IN_ACTION_TAGS = re.compile(
    r"(?:(?!<action>).)*<action>(?P<command>(?:(?!<action>).)*?)</action>(?:(?!<action>).)*", re.DOTALL
)
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
        _IN_ACTION_TAGS,
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
    "subgoal_action": ReplyFormat(
        "reply with KEEP or SWITCH between <switch> and </switch>, to keep your subgoal or to change it, "
        "then the subgoal between <subgoal> and </subgoal>, then your next command between <action> and "
        "</action>.",
        "<action>{}</action>",
        _IN_ACTION_TAGS,
        True,
        plan="<switch>KEEP</switch><subgoal></subgoal>",
    ),
}
# The rest of think_action where the prompt already holds a whole think block.
AFTER_THOUGHTS = ReplyFormat(
    REPLY_FORMATS["action_tags"].asks,
    "<action>{}</action>",
    re.compile(r"<action>(?P<command>(?:(?!</?action>).)*)</action>", re.DOTALL),
    True,
)
