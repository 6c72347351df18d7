"""A short list of admissible actions: the verbs that tasks need, times the objects within reach.

The simulator's own list (hundreds to thousands of actions) takes tens of milliseconds per step; asking it
only for the unique names of the objects within reach takes a few. The verbs for an object follow from its
class.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import NamedTuple

from agentrl_envs.scienceworld.simulator import OBJECT, Reference, Simulator

ROOMS = (
    *("art studio", "bathroom", "bedroom", "foundry", "greenhouse", "hallway", "kitchen", "living room"),
    *("outside", "workshop"),
)
MAX_ACTIONS = 600  # actions in a list

_PARSER = "z:scienceworld.input.InputParser"

# Prefixes of class names.
_SCENERY = ("agent.", "location.", "portal.", "substance.Air", "containers.Sewer")
_TERMINALS = ("electricalcomponent.Anode", "electricalcomponent.Cathode", "electricalcomponent.Terminal")
_APPLIANCES = (
    *("devices.Bathtub", "devices.BlastFurnace", "devices.Freezer", "devices.Fridge", "devices.HotPlate"),
    *("devices.Oven", "devices.Sink", "devices.Stove", "devices.Toilet", "devices.UltraColdFreezer"),
)
_FIXED = (
    *("containers.furniture.", "containers.BookShelf", "environmentoutside.", "misc.InclinedPlane"),
    "taskitems.AnswerBox",
)
_VESSELS = (
    *(
        "containers.CeramicCup",
        "containers.Cup",
        "containers.GlassCup",
        "containers.GlassJar",
        "containers.Jug",
    ),
    *("containers.MetalPot", "containers.PaperCup", "containers.PlasticCup", "containers.TinCup"),
    *("containers.WoodBowl", "containers.WoodCup"),
)
_POTS = ("containers.FlowerPot", "containers.SelfWateringFlowerPot")
_TARGETS = ("environmentoutside.FirePit", "misc.InclinedPlane")
_CLOSABLE = (
    *("containers.furniture.BeeHive", "containers.furniture.Closet", "containers.furniture.Cupboard"),
    *("containers.furniture.Drawer", "containers.GlassJar", "devices.BlastFurnace", "devices.Freezer"),
    *("devices.Fridge", "devices.Oven", "devices.UltraColdFreezer"),
)
_SWITCHED = (
    *("devices.BlastFurnace", "devices.HotPlate", "devices.Lighter", "devices.Oven", "devices.Sink"),
    *("devices.StopWatch", "devices.Stove", "electricalcomponent.GasGenerator"),
    *("electricalcomponent.NuclearGenerator", "electricalcomponent.Switch"),
)
_TOOLS = ("devices.Axe", "devices.Lighter", "devices.Shovel", "devices.Thermometer")


class Thing(NamedTuple):
    """An object within reach.

    Attributes:
        id: The simulator's id.
        name: The simulator's unique name.
        kind: The class, such as "devices.Stove".
    """

    id: int
    name: str
    kind: str


class Reach:
    """View of the objects within reach of the agent in one running game.

    Args:
        simulator: The simulator that runs the game.
        hidden: Whether to include objects that are not shown, such as the terminals for electricity.
    """

    def __init__(self, simulator: Simulator, hidden: bool) -> None:
        self._gateway = simulator.gateway
        self._simulator = simulator
        self._hidden = hidden
        interface = simulator.interface()
        self._agent, self._parser = self._gateway.calls((interface, "agent"), (interface, "inputParser"))
        found = self._gateway.call("z:java.lang.Class", "forName", OBJECT)
        self._tag = self._gateway.call("z:scala.reflect.ClassTag", "apply", found)
        self._gateway.release(interface, found)
        self._kinds: dict[int, str] = {}

    def things(self) -> list[Thing]:
        """Return the objects within reach, ordered by name."""
        room, things = self._objects()
        names = self._gateway.call(
            self._parser, "getAllUniqueReferentsLUTObjList", things, room, self._hidden, False
        )
        written = self._gateway.call(names, "toString")
        self._gateway.release(room, things, names)
        found = {int(id): name for id, name in re.findall(r"(\d+) -> (.*?)(?=, \d+ -> |\)$)", written)}
        if not found.keys() <= self._kinds.keys():
            self._kinds = self._read_kinds()
        known = (Thing(id, name, self._kinds.get(id, "")) for id, name in found.items())
        return sorted(known, key=lambda thing: (thing.name, thing.id))

    def room(self) -> str:
        """Return the name of the room."""
        container = self._gateway.call(self._agent, "getContainer")
        room = self._gateway.call(container, "get")
        name = str(self._gateway.call(room, "name"))
        self._gateway.release(container, room)
        return name

    def meant(self, phrase: str) -> set[int]:
        """Return the ids of the objects that a phrase may refer to."""
        room, things = self._objects()
        matched = self._gateway.call(self._parser, "matchObj", phrase, things, room)
        pairs = self._gateway.call(matched, "_2")
        found = self._gateway.items(pairs)
        held, ids = [room, things, matched, pairs, *found], set()
        for pair in found:
            rest, thing = self._gateway.calls((pair, "_1"), (pair, "_2"))
            held.append(thing)
            if not rest:
                ids.add(int(self._gateway.call(thing, "uuid")))
        self._gateway.release(*held)
        return ids

    def release(self) -> None:
        """Release the Java objects of the game."""
        self._gateway.release(self._agent, self._parser, self._tag)

    def _objects(self) -> tuple[Reference, Reference]:
        call = self._gateway.call
        container = call(self._agent, "getContainer")
        room = call(container, "get")
        here, carried = self._gateway.calls(
            (_PARSER, "collectAccessibleObjects", room, self._hidden),
            (_PARSER, "collectAccessibleObjects", self._agent, self._hidden),
        )
        union = call(here, "union", carried)
        things = call(union, "toArray", self._tag)
        self._gateway.release(container, here, carried, union)
        return room, things

    def _read_kinds(self) -> dict[int, str]:
        classes = json.loads(self._simulator.text("getObjectTypesLUTJSON"))
        names = {int(number): name.removeprefix("scienceworld.objects.") for name, number in classes.items()}
        kinds = json.loads(self._simulator.text("getAllObjectTypesLUTJSON"))
        return {int(id): names.get(int(kind), "") for id, kind in kinds.items()}


class Meaning(NamedTuple):
    """Meaning of an action, whatever its wording: a verb, and the ids of the objects that it applies to."""

    verb: str
    ids: tuple[int, ...] = ()


def lexicon(things: Sequence[Thing], room: str, teleports: bool, electrical: bool) -> dict[str, Meaning]:
    """Return actions with their meanings: the first `MAX_ACTIONS` in the order of usefulness.

    Args:
        things: The objects within reach.
        room: The room that the agent is in.
        teleports: Whether the agent may teleport to any room.
        electrical: Whether the agent may connect terminals.
    """
    listed: dict[str, Meaning] = {}
    for action, meaning in _actions(things, room, teleports, electrical):
        listed.setdefault(action, meaning)
    return dict(islice(listed.items(), MAX_ACTIONS))


def _actions(
    things: Sequence[Thing], room: str, teleports: bool, electrical: bool
) -> Iterator[tuple[str, Meaning]]:
    yield from ((action, Meaning(action)) for action in ("look around", "inventory", "wait", "wait1"))
    yield from _each("go to", [thing for thing in things if thing.kind.startswith("location.")], skip=room)
    if teleports:
        yield from ((f"teleport to {name}", Meaning(f"teleport to {name}")) for name in ROOMS if name != room)
    solid = [thing for thing in things if not thing.kind.startswith((*_SCENERY, *_TERMINALS))]
    movable = [thing for thing in solid if not thing.kind.startswith((*_FIXED, *_APPLIANCES))]
    vessels = _of(solid, _VESSELS)
    closable = _of(things, (*_CLOSABLE, "portal.Door"))
    switched = _of(solid, _SWITCHED)
    yield from _each("look at", solid)
    yield from _each("focus on", solid)
    yield from _each("pick up", movable)
    yield from _each("put down", movable)
    yield from _each("open", closable)
    yield from _each("close", closable)
    yield from _each("activate", switched)
    yield from _each("deactivate", switched)
    yield from _each("read", _of(solid, ("document.",)))
    yield from _each("mix", vessels)
    yield from _pairs("use", "on", _of(solid, _TOOLS), solid)
    if electrical:
        yield from _connections(things, movable)
    yield from _pairs("pour", "into", vessels, [*vessels, *_of(solid, _POTS)])
    yield from _pairs("move", "to", solid, _of(solid, ("taskitems.AnswerBox",)))
    yield from _pairs("move", "to", movable, _of(solid, (*_VESSELS, *_POTS, *_APPLIANCES, *_TARGETS)))


def _of(things: Iterable[Thing], kinds: tuple[str, ...]) -> list[Thing]:
    return [thing for thing in things if thing.kind.startswith(kinds)]


def _each(verb: str, things: Iterable[Thing], skip: str = "") -> Iterator[tuple[str, Meaning]]:
    return ((f"{verb} {it.name}", Meaning(verb, (it.id,))) for it in things if it.name != skip)


def _pairs(
    verb: str, link: str, ones: Iterable[Thing], others: Sequence[Thing]
) -> Iterator[tuple[str, Meaning]]:
    for one in ones:
        for other in others:
            if one.id != other.id:
                yield f"{verb} {one.name} {link} {other.name}", Meaning(verb, (one.id, other.id))


def _connections(things: Sequence[Thing], movable: Sequence[Thing]) -> Iterator[tuple[str, Meaning]]:
    """Yield connections of a wire's terminal with any terminal that does not belong to a fixed object."""
    ends = _of(things, _TERMINALS)
    fixed = {"room", *(it.name for it in things if it not in ends and it not in movable)}
    ends = [end for end in ends if _owner(end.name) not in fixed]
    wires = [end for end in ends if "wire" in end.name.split()]
    yield from _pairs("connect", "to", [end for end in ends if end not in wires], wires)
    for index, wire in enumerate(wires):
        yield from _pairs("connect", "to", [wire], wires[index + 1 :])


def valid_actions(simulator: Simulator) -> dict[str, Meaning]:
    """Return every action that is valid now according to the simulator, with its meaning; slow."""
    listed = json.loads(simulator.text("getValidActionObjectCombinationsJSON"))["validActions"]
    verbs = sorted((*_ONE, *_TWO), key=len, reverse=True)
    found = {}
    for item in listed:
        verb = next((verb for verb in verbs if item["action"].startswith(f"{verb} ")), item["action"])
        found[item["action"]] = Meaning(verb, tuple(map(int, item["obj_ids"])))
    return found


def numbers(question: str) -> dict[str, Meaning]:
    """Return the possible answers to a question: the numbers of the listed meanings."""
    return {number: Meaning(number) for number in re.findall(r"^(\d+):\t", question, re.MULTILINE)}


def _owner(end: str) -> str:
    """Return the owner of a terminal: the table for "table terminal 1" and "terminal 1 in table"."""
    before, _, after = end.partition(" in ")
    return after or before.partition(" terminal ")[0]


def same_action(action: str, offered: Mapping[str, Meaning], reach: Reach) -> str | None:
    """Return an offered action with the same meaning as `action`, whose wording may differ; None if none."""
    if action in offered:
        return action
    meanings = {meaning: text for text, meaning in reversed(list(offered.items()))}
    for verb, phrases in readings(action):
        meant = [reach.meant(phrase) for phrase in phrases]
        for ids in product(*map(sorted, meant)):
            orders = (ids, ids[::-1]) if verb == "connect" else (ids,)
            for order in orders:
                if Meaning(verb, order) in meanings:
                    return meanings[Meaning(verb, order)]
    return None


_ONE = {
    **{verb: verb for verb in ("look at", "focus on", "pick up", "put down", "open", "close", "activate")},
    **{verb: verb for verb in ("deactivate", "read", "mix", "go to", "eat", "flush", "look in")},
    "examine": "look at",
    "drop": "put down",
}
_TWO = {"move": ("to",), "pour": ("into", "in"), "use": ("on",), "connect": ("to",), "dunk": ("into", "in")}
_STOP_WORDS = {"a", "an", "the"}


def readings(action: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the ways to parse an action: its canonical verb, and the phrases for its objects.

    >>> list(readings("pour cup in art studio in jug"))
    [('pour', ['cup', 'art studio in jug']), ('pour', ['cup in art studio', 'jug'])]
    """
    words = [word for word in action.lower().split() if word not in _STOP_WORDS]
    plain = " ".join(words)
    for verb, usual in _ONE.items():
        if plain.startswith(f"{verb} "):
            yield usual, [plain[len(verb) + 1 :]]
    links = _TWO.get(words[0] if words else "", ())
    for index in range(2, len(words) - 1):
        if words[index] in links:
            yield words[0], [" ".join(words[1:index]), " ".join(words[index + 1 :])]
