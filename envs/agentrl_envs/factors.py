"""Factors of turns in the environments that ship with agentrl; see `agentrl.env.factors`."""

import re
from collections.abc import Mapping

from agentrl.env.factors import Factor, PlayedTurn, share_of, words

_OBJECT = re.compile(r"\b([a-z]+ \d+)\b")
_SMALL_WORDS = words("a an the and or of in on to it with is your task find me some put two first next")


def household_goal(turn: PlayedTurn) -> float:
    """Return the share of the goal's words that action and answer have; ALFWorld, in either wording."""
    _, told, goal = turn.opening.partition("Your task is to: ")
    goal = goal if told else turn.opening.partition(":")[0]
    return share_of(words(goal) - _SMALL_WORDS, f"{turn.action} {turn.answer}")


def new_objects(turn: PlayedTurn) -> float:
    """Return how many objects the answer names that were never named before, in fives, at most 1."""
    known = {name for text in turn.seen for name in _OBJECT.findall(text)}
    return min(1.0, len(set(_OBJECT.findall(turn.answer)) - known) / 5)


def picked_up(turn: PlayedTurn) -> float:
    """Return 1 if an object was picked up, -1 if one was put down."""
    taken = turn.answer.startswith(("You pick up", "holding "))
    left = turn.answer.startswith(("You move", "You put", "hands empty")) and turn.action != "inventory"
    return float(taken) - float(left)


def changed(turn: PlayedTurn) -> float:
    """Return 1 if an object was cleaned, heated or cooled, or a lamp turned on."""
    return float(re.match(r"(You )?(clean|heat|cool|turn on)\b|.*: on$", turn.answer) is not None)


def opened(turn: PlayedTurn) -> float:
    """Return 1 if something was opened."""
    return float(turn.action.startswith("open ") and turn.answer not in ("", turn.observation))


def shopping_goal(turn: PlayedTurn) -> float:
    """Return the share of the instruction's words that the action has; WebShop."""
    goal = re.search(r"Instruction: \[SEP\] (.*?)(?: \[SEP\]|$)", turn.opening)
    return share_of(words(goal[1] if goal else "") - _SMALL_WORDS, turn.action)


def searched(turn: PlayedTurn) -> float:
    """Return 1 for a search."""
    return float(turn.action.startswith("search["))


def bought(turn: PlayedTurn) -> float:
    """Return 1 for buying."""
    return float(turn.action == "click[buy now]")


def laboratory_goal(turn: PlayedTurn) -> float:
    """Return the share of the task's words that the action has; ScienceWorld."""
    task = turn.opening.partition("\n")[0]
    return share_of(words(task) - _SMALL_WORDS, turn.action)


def focused(turn: PlayedTurn) -> float:
    """Return 1 for an action that focuses on something, which may decide the task."""
    return float(turn.action.startswith("focus on "))


FACTORS: Mapping[str, Mapping[str, Factor]] = {
    "agentrl/ALFWorld-v0": {
        "goal_words": household_goal,
        "new_objects": new_objects,
        "picked_up": picked_up,
        "changed": changed,
        "opened": opened,
    },
    "agentrl/ScienceWorld-v0": {"goal_words": laboratory_goal, "focused": focused},
    "agentrl/WebShop-v0": {"goal_words": shopping_goal, "searched": searched, "bought": bought},
}
