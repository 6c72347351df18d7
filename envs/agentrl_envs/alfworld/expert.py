"""Scripted expert that searches for objects and uses only the observations of the episode."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from agentrl_envs.alfworld.wording import Wanted, listed, room_of

_CONTENT = re.compile(r"(?:On the ([\w ]+?)|The ([\w ]+?) is open\. In it), you see (.*?)\.")
_CLOSED = re.compile(r"The ([\w ]+?) is closed\.")
_TAKE = re.compile(r"take (.+) from (.+)")
_PUT = re.compile(r"(?:move|put) (.+?) (?:to|into|in/on|in|on) (.+)")
_TREAT = re.compile(r"(clean|heat|cool) (.+) with (.+)")
_TOOLS = {
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
}
_LAMP_STANDS = frozenset(
    {"desk", "sidetable", "dresser", "shelf", "coffeetable", "diningtable", "armchair", "sofa"}
)


def kind_of(name: str) -> str:
    """Return the class of a display name: "mug" for "mug 2"."""
    return name.rpartition(" ")[0]


class SearchingExpert:
    """Expert that remembers what was seen and chooses the next command, also after commands of a policy.

    Args:
        wanted: The task.
        opening: The first observation of the game.
        holds: Receptacle class -> object classes that fit into it: general knowledge, not about this room.
    """

    def __init__(self, wanted: Wanted, opening: str, holds: Mapping[str, frozenset[str]]) -> None:
        self.wanted = Wanted(wanted.task_type, wanted.object.lower(), wanted.place.lower())
        self.room = room_of(opening)
        classes = Counter(map(kind_of, self.room))
        # Large classes come last: searching 28 cabinets first would use up an episode.
        self.route = sorted(self.room, key=lambda receptacle: classes[kind_of(receptacle)])
        self.holds = holds
        self.contents: dict[str, list[str]] = {}  # receptacle -> objects seen in it
        self.closed: set[str] = set()
        self.held: str | None = None
        self.states: dict[str, set[str]] = {}  # object -> clean, heat, cool
        self.visited: set[str] = set()

    def observe(self, command: str, text: str) -> None:
        """Record a command, the expert's own or a policy's, and the observation after it."""
        for match in _CONTENT.finditer(text):
            receptacle = match[1] or match[2]
            self.contents[receptacle] = listed(match[3])
            self.closed.discard(receptacle)
            self.visited.add(receptacle)
        for match in _CLOSED.finditer(text):
            self.closed.add(match[1])
        if text.startswith("You close the "):
            self.closed.add(command.removeprefix("close "))
        if text.startswith("You pick up") and (taken := _TAKE.fullmatch(command)):
            self._take(taken[1])
        if text.startswith(("You move", "You put")) and (put := _PUT.fullmatch(command)):
            self.held = None
            self.contents.setdefault(put[2], []).append(put[1])
        if " using the " in text and (treated := _TREAT.fullmatch(command)):
            state = self.states.setdefault(treated[2], set())
            state -= {"heat": {"cool"}, "cool": {"heat"}}.get(treated[1], set())
            state.add(treated[1])

    def _take(self, item: str) -> None:
        self.held = item
        for items in self.contents.values():
            if item in items:
                items.remove(item)

    def next(self, actions: Sequence[str]) -> str | None:
        """Choose one of the admissible commands; None if none is useful."""
        offered = frozenset(actions)
        for command in self._ideas(offered):
            if command in offered:
                return command
        return next((command for command in actions if command.startswith("go to ")), None)

    def _ideas(self, offered: frozenset[str]) -> Iterable[str]:
        """Yield commands in order of preference; the first admissible one is chosen."""
        if self.held is not None and kind_of(self.held) != self.wanted.object:
            yield from self._put_down(self.held, offered)
        elif self.wanted.task_type == "look_at_obj_in_light":
            yield from self._look(offered)
        elif self.held is None:
            yield from self._fetch(offered)
        else:
            yield from self._deliver(self.held, offered)

    def _put_down(self, item: str, offered: frozenset[str]) -> Iterable[str]:
        yield from self._puts(item, None, offered)
        fitting = [r for r in self.room if kind_of(item) in self.holds.get(kind_of(r), ())]
        for receptacle in sorted(fitting, key=lambda r: r in self.closed):
            yield f"go to {receptacle}"
            yield f"open {receptacle}"

    def _look(self, offered: frozenset[str]) -> Iterable[str]:
        stand = next((r for r in self.room if self._lamps(self.contents.get(r, ()))), None)
        if self.held is None:
            yield from self._fetch(offered)
        elif stand is None:
            yield from self._search(_LAMP_STANDS.__contains__, offered)
        else:
            yield f"go to {stand}"
            yield from (f"use {lamp}" for lamp in self._lamps(self.contents[stand]))

    def _lamps(self, items: Iterable[str]) -> list[str]:
        return [item for item in items if kind_of(item) == self.wanted.place]

    def _fetch(self, offered: frozenset[str]) -> Iterable[str]:
        done = (
            self._target()
            if self.wanted.task_type in ("pick_two_obj_and_place", "pick_and_place_simple")
            else None
        )
        for receptacle in self.room:
            for item in self.contents.get(receptacle, ()):
                if kind_of(item) == self.wanted.object and receptacle != done:
                    yield f"take {item} from {receptacle}"
                    yield f"go to {receptacle}"
                    yield f"open {receptacle}"
        yield from self._search(lambda kind: self.wanted.object in self.holds.get(kind, ()), offered)

    def _deliver(self, item: str, offered: frozenset[str]) -> Iterable[str]:
        verb, tool = _TOOLS.get(self.wanted.task_type, ("", ""))
        if verb and verb not in self.states.get(item, ()):
            for place in (r for r in self.room if kind_of(r) == tool):
                yield f"{verb} {item} with {place}"
                yield f"go to {place}"
        else:
            target = self._target()
            yield from self._puts(item, target, offered)
            yield f"go to {target}"
            yield f"open {target}"

    def _target(self) -> str | None:
        """Return the target receptacle with the most goal objects, else the first listed."""
        places = [r for r in self.room if kind_of(r) == self.wanted.place]
        count = {r: sum(kind_of(i) == self.wanted.object for i in self.contents.get(r, ())) for r in places}
        return max(places, key=lambda r: count[r], default=None)

    def _puts(self, item: str, target: str | None, offered: frozenset[str]) -> Iterable[str]:
        for command in sorted(offered):
            match = _PUT.fullmatch(command)
            if match and match[1] == item and target in (None, match[2]):
                yield command

    def _search(self, plausible: Callable[[str], bool], offered: frozenset[str]) -> Iterable[str]:
        """Yield commands that search the receptacles not seen inside yet, plausible ones first."""
        unseen = [r for r in self.route if r not in self.visited]
        ordered = sorted(unseen or self.route, key=lambda r: not plausible(kind_of(r)))
        for receptacle in ordered:
            if f"open {receptacle}" in offered:
                yield f"open {receptacle}"
            yield f"go to {receptacle}"
            yield f"examine {receptacle}"
        # The unseen receptacles share this view point: leave it, so that a later command can return here.
        yield from (f"go to {receptacle}" for receptacle in self.room)
