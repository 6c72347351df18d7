"""Tool reward: a reward for tool calls that decays over training, for policies that must learn to call."""

from collections.abc import Sequence

from agentrl.algorithms.hooks import Context
from agentrl.data.trajectory import Episode
from agentrl.schedule import cosine

MAX_REWARDED_CALLS = 10  # further tool calls earn nothing
ANSWER = "answer"  # value of `info["tool"]` for the turn that gives the final answer


def tool_calls(episode: Episode) -> int:
    """Count the turns that called a tool; all turns if the environment names no tools.

    A call is a turn whose `info["tool"]` names a tool other than the answer.
    """
    named = [turn.info["tool"] for turn in episode.turns if "tool" in turn.info]
    return sum(tool not in (None, ANSWER) for tool in named) if named else len(episode.turns)


def calls_tool(episode: Episode) -> bool:
    """Return whether the episode called a tool."""
    return tool_calls(episode) > 0


def tool_bonus(
    episode: Episode, context: Context, *, most: float, steps: int, first: int = 0
) -> Sequence[float]:
    """Return the rewards, with the reward for tool calls added to the last one.

        most * min(1, calls / MAX_REWARDED_CALLS) * (1 + cos(pi t / steps)) / 2

    at step t, and 0 from `steps` on; `first` is the number of the first training step.
    """
    rewards = [turn.reward for turn in episode.turns]
    if rewards:
        bonus = most * min(1.0, tool_calls(episode) / MAX_REWARDED_CALLS)
        rewards[-1] += bonus * cosine(context.step + first, steps + 1, floor=0.0)
    return rewards
