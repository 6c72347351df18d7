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


def _bare(text: str) -> str:
    return _ARTICLES.sub("", text.strip()).removesuffix(".")
