"""Compact wording of the game's texts, for policies with a short context."""

import re
from typing import NamedTuple


class Wanted(NamedTuple):
    """Goal of a task: an object type and the receptacle type to put it in (a lamp type for look tasks)."""

    task_type: str
    object: str
    place: str


_SENTENCES = {
    "pick_and_place_simple": "put {object} in {place}",
    "look_at_obj_in_light": "look at {object} under {place}",
    "pick_clean_then_place_in_recep": "put clean {object} in {place}",
    "pick_heat_then_place_in_recep": "put hot {object} in {place}",
    "pick_cool_then_place_in_recep": "put cool {object} in {place}",
    "pick_two_obj_and_place": "put two {object} in {place}",
}

_NAME = r"([\w ]+? ?\d*)"
_SHORT = [
    (re.compile(pattern, re.DOTALL), result)
    for pattern, result in (
        (
            rf"(?:You arrive at .*?\. )?(?:You open the .*?\. )?The {_NAME} is open\. In it, you see (.*)\.",
            r"\1: \2",
        ),
        (rf"(?:You arrive at .*?\. )?On the {_NAME}, you see (.*)\.", r"\1: \2"),
        (r"(?:You arrive at .*?\. )?The .* is closed\.", "closed"),
        (r"You close the .*\.", "closed"),
        (rf"You pick up the {_NAME} from .*\.", r"holding \1"),
        (r"You (?:move|put) the .*\.", "hands empty"),
        (rf"You (heat|cool|clean) the {_NAME} using .*\.", r"\2: \1"),
        (rf"You turn on the {_NAME}\.", r"\1: on"),
        (rf"You sliced the {_NAME} with .*\.", r"\1: sliced"),
        (r"You are carrying: (.*)\.", r"holding \1"),
        (r"You are not carrying anything\.", "hands empty"),
        (r"You are facing the (.*)\. Next to it, you see .*\.", r"at \1"),
        (r"You are in the middle of a room\. .*", "in the middle"),
        (r"Nothing happens\.", "nothing happens"),
    )
]
_OTHER_WORDS = [
    (re.compile(pattern), result)
    for pattern, result in (
        (r"\bYou are in the middle of a room\.", "You stand in the middle of a room."),
        (r"\bLooking quickly around you, you see (.*?)\.", r"A quick look around shows \1."),
        (r"\bYou arrive at (.*?)\.", r"You have come to \1."),
        (r"\bOn the (.*?), you see (.*?)\.", r"There is \2 on the \1."),
        (r"\bThe ([\w ]*?) is open\. In it, you see (.*?)\.", r"The \1 stands open, with \2 in it."),
        (r"\bThe ([\w ]*?) is closed\.", r"The \1 is shut."),
        (r"\bYou (open|close) the ", r"You now \1 the "),
        (r"\bYou pick up the (.*?) from the (.*?)\.", r"From the \2 you now hold the \1."),
        (r"\bYou (?:move|put) the (.*?) to the (.*?)\.", r"The \1 is now at the \2."),
        (r"\bYou (heat|cool|clean) the (.*?) using the (.*?)\.", r"Using the \3, you \1 the \2."),
        (r"\bYou turn on the ", "You switch on the "),
        (r"\bYou are carrying: (.*?)\.", r"In your hands: \1."),
        (r"\bYou are not carrying anything\.", "There is nothing in your hands."),
        (r"\bNothing happens\.", "That has no effect."),
        (r"^closed$", "it is closed"),
        (r"^holding ", "you are holding "),
        (r"^hands empty$", "holding nothing"),
        (r"^nothing happens$", "nothing"),
    )
]
_SHORT_LIST = re.compile(r"(?<=: )[a-z]+ \d+(?: [a-z]+ \d+)+$")
_STATE = {"heat": "hot", "cool": "cool", "clean": "clean"}
_ARTICLES = re.compile(r"\b(?:a|the) ")
_ROOM = re.compile(r"Looking quickly around you, you see (.*?)\.(?:\n|$)")
_TASK = re.compile(r"Your task is to: (.*)\.", re.DOTALL)


def listed(text: str) -> list[str]:
    """Split "a mug 1, and a pen 2" into its names; "nothing" gives an empty list."""
    names = (piece.strip().removeprefix("and ").removeprefix("a ") for piece in text.split(", "))
    return [name for name in names if name and name != "nothing"]


def room_of(opening: str) -> list[str]:
    """Return the receptacles that the first observation of a game lists."""
    found = _ROOM.search(opening)
    return listed(found[1]) if found else []


def task_text(opening: str) -> str | None:
    """Return the task that the first observation of a game states, in its words; None if it states none."""
    found = _TASK.search(opening)
    return found[1] if found else None


def compact_task(opening: str, wanted: Wanted | None) -> str:
    """Reword the task in one short sentence."""
    if wanted is not None and wanted.task_type in _SENTENCES:
        return _SENTENCES[wanted.task_type].format(object=wanted.object.lower(), place=wanted.place.lower())
    return _ARTICLES.sub("", task_text(opening) or opening)


def compact_opening(opening: str, wanted: Wanted | None) -> str:
    """Reword the first observation: the task in one short sentence, then the room's receptacles."""
    return f"{compact_task(opening, wanted)}: {' '.join(room_of(opening))}"


def compact(text: str) -> str:
    """Reword an observation, as in "toaster 1: bread 2 knife 1", "closed" or "holding bread 2"."""
    for pattern, result in _SHORT:
        match = pattern.fullmatch(text)
        if match:
            short = match.expand(result)
            head, colon, tail = short.partition(": ")
            if colon and tail in _STATE:
                return f"{head}: {_STATE[tail]}"
            return (
                f"{head}: {' '.join(listed(tail)) or 'nothing'}" if colon and "see" in text else _bare(short)
            )
    return _bare(text)


def reworded(text: str, task: str | None) -> str:
    """Say an observation in other words or in another order, and the task in the same words.

    >>> reworded("You arrive at desk 1. On the desk 1, you see a mug 1.", None)
    'You have come to desk 1. There is a mug 1 on the desk 1.'
    >>> reworded("put mug in desk: desk 1 drawer 2", "put mug in desk")
    'put mug in desk: drawer 2 desk 1'
    """
    before, named, after = text.partition(task) if task else ("", "", text)
    return _in_other_words(before) + named + _in_other_words(after)


def _in_other_words(text: str) -> str:
    for pattern, result in _OTHER_WORDS:
        text = pattern.sub(result, text)
    return _SHORT_LIST.sub(lambda found: " ".join(reversed(re.findall(r"[a-z]+ \d+", found[0]))), text)


def _bare(text: str) -> str:
    return _ARTICLES.sub("", text.strip()).removesuffix(".")
