"""Make games: real floor plans, rules, sentences and affordances; sampled objects in sampled places.

A game is a pure function of (split, index, options). The scenes of `valid_unseen` occur in no other split.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from agentrl.errors import ConfigError
from agentrl_envs.alfworld.engine import display_names
from agentrl_envs.alfworld.wheel import (
    MOVABLE,
    FloorPlan,
    Receptacle,
    Wheel,
    load_wheel,
    location_id,
    pddl_id,
)

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
SPLITS = {"train": 1_000_000, "valid_seen": 1_000, "valid_unseen": 1_000}
UNSEEN_SCENES = frozenset({9, 10, 29, 215, 219, 226, 308, 315, 325, 404, 424, 425})
START = location_id(0, 0, 0, 0)

_TOOLS = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin", "clean"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave", "heat"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge", "cool"),
}
_ABILITIES = ("Cleanable", "Heatable", "Coolable", "Sliceable")
_LAMP_STANDS = {
    "DeskLamp": frozenset({"Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "DiningTable", "TVStand"}),
    "FloorLamp": frozenset(
        {"SideTable", "Dresser", "ArmChair", "Sofa", "Desk", "TVStand", "CoffeeTable", "Bed"}
    ),
}
_USUAL_COUNT = {
    "StoveBurner": 4,
    "Cabinet": 4,
    "Drawer": 4,
    "Shelf": 3,
}  # of furniture absent from the floor plan
_RULES_NEED_OBJECT = ("ButterKnife", "Knife")
_RULES_NEED_RECEPTACLE = ("Fridge", "Microwave", "SinkBasin")
_INSTANCES = (1, 2, 3)
_INSTANCE_WEIGHTS = (9, 16, 20)  # cumulative: 45, 35 and 20 %


@dataclass(frozen=True, slots=True)
class Options:
    """What kind of games: None means no restriction.

    `max_receptacles` keeps one receptacle per type, and so many of these, those the goal needs among them;
    `object_types` is how many types of movable objects lie in the room.
    """

    task_types: tuple[str, ...] = TASK_TYPES
    max_receptacles: int | None = None
    object_types: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.task_types if name not in TASK_TYPES]
        if unknown or not self.task_types or len(set(self.task_types)) < len(self.task_types):
            raise ConfigError(f"task_types: {list(self.task_types)}, wanted some of {', '.join(TASK_TYPES)}")
        for name, value, least in (
            ("max_receptacles", self.max_receptacles, 4),
            ("object_types", self.object_types, 2),
        ):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}: {value!r}, wanted a whole number of at least {least}, or none")


@dataclass(frozen=True, slots=True)
class Goal:
    """What the player is told, the condition in PDDL, and commands that reach it."""

    object: str
    sentence: str
    pddl: str
    walkthrough: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GeneratedGame:
    """One game; `other` is a goal of the same type with another object of this room, if there is one."""

    task: str
    task_type: str
    scene: int
    receptacle: str
    room: str
    goal: Goal
    other: Goal | None

    @property
    def problem(self) -> str:
        return self.room + self.goal.pddl

    @property
    def grammar(self) -> str:
        return load_wheel().grammar.replace("UNKNOWN GOAL", self.goal.sentence)

    def swapped(self) -> "GeneratedGame":
        """Give the same room with the two goals exchanged."""
        if self.other is None:
            raise ConfigError(f"task {self.task!r} has no other goal")
        return GeneratedGame(
            self.task, self.task_type, self.scene, self.receptacle, self.room, self.other, self.goal
        )

    def hash(self) -> str:
        """Hash everything that the game is made of."""
        parts = (load_wheel().domain, self.problem, self.grammar)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Thing:
    """A movable object or a lamp, and where it lies."""

    id: str
    type: str
    place: Receptacle


@dataclass(frozen=True, slots=True)
class _Wish:
    """A goal to make a room for."""

    task_type: str
    object: str
    receptacle: str
    lamp: str | None


@dataclass(frozen=True, slots=True)
class _Scene:
    """A floor plan and what can be asked for: task type -> object -> receptacle types (lamps for look)."""

    plan: FloorPlan
    furniture: tuple[str, ...]
    objects: tuple[str, ...]
    wishes: Mapping[str, Mapping[str, tuple[str, ...]]]


def scenes(split: str) -> list[int]:
    """List the floor plans of a split."""
    unseen = split == "valid_unseen"
    return [number for number in load_wheel().plans if (number in UNSEEN_SCENES) == unseen]


def generate(split: str, index: int, options: Options) -> GeneratedGame:
    """Make game `index` of a split; consecutive indices take the task types in turn."""
    rng = Random(f"agentrl alfworld 1 {split} {index}")
    task_type = options.task_types[index % len(options.task_types)]
    wheel = load_wheel()
    scene = rng.choice(_able_scenes(split, task_type))
    item = rng.choice(tuple(scene.wishes[task_type]))
    target = rng.choice(scene.wishes[task_type][item])
    if task_type == "look_at_obj_in_light":
        stands = [kind for kind in scene.furniture if kind in _LAMP_STANDS[target]]
        wish = _Wish(task_type, item, rng.choice(stands), target)
    else:
        wish = _Wish(task_type, item, target, None)
    twins = [kind for kind, places in scene.wishes[task_type].items() if kind != item and target in places]
    twin = rng.choice(twins) if twins else None
    room = _Room(rng, wheel, scene, wish, twin, options)
    text = _room_text(wheel, f"{split}_{index}", room)
    template = rng.randrange(len(wheel.goals[task_type][1]))
    names = dict(zip(room.ids, display_names(room.ids), strict=True))
    goals = [_goal(wheel, room, names, wish, kind, template) for kind in (item, twin) if kind is not None]
    other = goals[1] if len(goals) > 1 else None
    shown = wish.lamp or wish.receptacle
    return GeneratedGame(f"{split}/{index}", task_type, scene.plan.number, shown, text, goals[0], other)


@lru_cache(maxsize=64)
def _able_scenes(split: str, task_type: str) -> tuple[_Scene, ...]:
    found = tuple(scene for number in scenes(split) if (scene := _scene(number)).wishes[task_type])
    if not found:
        raise ConfigError(f"no scene of split {split!r} allows the task type {task_type!r}")
    return found


@lru_cache(maxsize=256)
def _scene(number: int) -> _Scene:
    wheel = load_wheel()
    plan = wheel.plans[number]
    movable = set().union(*wheel.holds.values()) - (wheel.holds.keys() - MOVABLE)
    fixed = {kind for kind in plan.types if kind in wheel.holds and kind not in MOVABLE}
    furniture = sorted(fixed | {receptacle.type for receptacle in plan.receptacles})
    objects = tuple(sorted(kind for kind in plan.types & movable if _homes(wheel, kind, furniture)))
    wishes = {kind: _wishes(wheel, plan, furniture, objects, kind) for kind in TASK_TYPES}
    return _Scene(plan, tuple(furniture), objects, wishes)


def _homes(wheel: Wheel, item: str, furniture: Iterable[str]) -> list[str]:
    return [kind for kind in furniture if item in wheel.holds[kind]]


def _wishes(
    wheel: Wheel, plan: FloorPlan, furniture: Sequence[str], objects: Sequence[str], task_type: str
) -> dict[str, tuple[str, ...]]:
    if task_type == "look_at_obj_in_light":
        lamps = tuple(
            lamp
            for lamp, stands in _LAMP_STANDS.items()
            if lamp in plan.types and stands.intersection(furniture)
        )
        return dict.fromkeys(objects, lamps) if lamps else {}
    ability, tool, _ = _TOOLS.get(task_type, (None, None, None))
    if tool is not None and tool not in furniture:
        return {}
    wishes = {}
    for item in objects:
        homes = _homes(wheel, item, furniture)
        targets = tuple(kind for kind in homes if kind != tool and homes != [kind])
        if targets and (ability is None or item in wheel.able[ability]):
            wishes[item] = targets
    return wishes


class _Room:
    """Receptacles and objects of one game, drawn so that neither goal is reached at the start."""

    def __init__(
        self, rng: Random, wheel: Wheel, scene: _Scene, wish: _Wish, twin: str | None, options: Options
    ) -> None:
        self.rng = rng
        self.wheel = wheel
        # A goal object may lie anywhere but where it shall go; for look, where it lies does not matter.
        self.forbidden = None if wish.lamp else wish.receptacle
        self.wanted = (wish.object,) if twin is None else (wish.object, twin)
        self.receptacles = self._furnish(scene, wish, options.max_receptacles)
        self.lamps = self._light(scene, wish)
        self.things = self._fill(scene, wish, options.object_types)
        self.locations = sorted({START, *(receptacle.location for receptacle in self.receptacles)})
        self.ids = [thing.id for thing in self.lamps + self.things]
        self.ids += [receptacle.id for receptacle in self.receptacles]

    def _furnish(self, scene: _Scene, wish: _Wish, limit: int | None) -> list[Receptacle]:
        present = list(scene.plan.receptacles)
        used = {receptacle.location for receptacle in present} | {START}
        known = {receptacle.type for receptacle in present}
        for kind in scene.furniture:
            if kind not in known:
                count = 1 if limit is not None else _USUAL_COUNT.get(kind, 1)
                present += [self._somewhere(kind, used) for _ in range(count)]
        if limit is None:
            return present
        by_type: dict[str, list[Receptacle]] = {}
        for receptacle in present:
            by_type.setdefault(receptacle.type, []).append(receptacle)
        keep = self._required(scene, wish)
        rest = sorted(by_type.keys() - keep)
        self.rng.shuffle(rest)
        chosen = sorted(keep) + rest[: max(0, limit - len(keep))]
        return [self.rng.choice(by_type[kind]) for kind in chosen]

    def _required(self, scene: _Scene, wish: _Wish) -> set[str]:
        """Name receptacle types that both goals need: the target, the tool, and where the objects may lie."""
        keep = {wish.receptacle}
        if wish.task_type in _TOOLS:
            keep.add(_TOOLS[wish.task_type][1])
        for item in self.wanted:
            homes = [kind for kind in _homes(self.wheel, item, scene.furniture) if kind != self.forbidden]
            if not keep.intersection(homes):
                keep.add(self.rng.choice(homes))
        return keep

    def _somewhere(self, kind: str, used: set[str]) -> Receptacle:
        rng = self.rng
        while True:
            location = location_id(
                rng.randint(-12, 12), rng.randint(-12, 12), rng.randrange(4), 30 * rng.randrange(3)
            )
            if location not in used:
                used.add(location)
                return Receptacle(self._new_id(kind), kind, location)

    def _new_id(self, kind: str) -> str:
        draw = self.rng.random
        numbers = [f"{'+-'[draw() < 0.5]}{draw() * 4:05.2f}" for _ in range(3)]
        if kind.endswith("Basin"):
            return pddl_id("|".join([kind.removesuffix("Basin"), *numbers, kind]))
        return pddl_id("|".join([kind, *numbers]))

    def _light(self, scene: _Scene, wish: _Wish) -> list[_Thing]:
        lamps = []
        for lamp, stands in _LAMP_STANDS.items():
            if lamp not in scene.plan.types:
                continue
            places = [r for r in self.receptacles if r.type in stands]
            if lamp == wish.lamp:
                places = [r for r in places if r.type == wish.receptacle]
            if places:
                lamps.append(_Thing(self._new_id(lamp), lamp, self.rng.choice(places)))
        return lamps

    def _fill(self, scene: _Scene, wish: _Wish, limit: int | None) -> list[_Thing]:
        places = {kind: self._places(kind) for kind in scene.objects}
        possible = [kind for kind in scene.objects if places[kind] and kind not in self.wanted]
        if limit is not None:
            extra = max(0, limit - len(self.wanted))
            possible = self.rng.sample(possible, min(extra, len(possible)))
        things = []
        for kind in sorted({*possible, *self.wanted}):
            (count,) = self.rng.choices(_INSTANCES, cum_weights=_INSTANCE_WEIGHTS)
            if kind in self.wanted and wish.task_type == "pick_two_obj_and_place":
                count = max(2, count)
            things += [_Thing(self._new_id(kind), kind, self.rng.choice(places[kind])) for _ in range(count)]
        return things

    def _places(self, kind: str) -> list[Receptacle]:
        avoided = self.forbidden if kind in self.wanted else None
        holds = self.wheel.holds
        return [r for r in self.receptacles if r.type != avoided and kind in holds[r.type]]


def _room_text(wheel: Wheel, name: str, room: _Room) -> str:
    """Write a PDDL problem up to its goal."""
    things = room.lamps + room.things
    object_types = sorted({thing.type for thing in things}.union(_RULES_NEED_OBJECT))
    receptacle_types = sorted({r.type for r in room.receptacles}.union(_RULES_NEED_RECEPTACLE))
    lines = [f"(define (problem agentrl_{name})", " (:domain alfred)", " (:objects", "  agent1 - agent"]
    lines += [f"  {thing.id} - object" for thing in things]
    lines += [f"  {kind}Type - otype" for kind in object_types]
    lines += [f"  {kind}Type - rtype" for kind in receptacle_types]
    lines += [f"  {location} - location" for location in room.locations]
    lines += [f"  {receptacle.id} - receptacle" for receptacle in room.receptacles]
    lines += [" )", " (:init", "  (= (total-cost) 0)", f"  (atLocation agent1 {START})"]
    for receptacle in room.receptacles:
        lines.append(f"  (receptacleType {receptacle.id} {receptacle.type}Type)")
        lines.append(f"  (receptacleAtLocation {receptacle.id} {receptacle.location})")
        if receptacle.type in wheel.openable:
            lines.append(f"  (openable {receptacle.id})")
    for kind in receptacle_types:
        held = wheel.holds[kind]
        lines += [f"  (canContain {kind}Type {item}Type)" for item in object_types if item in held]
    for thing in things:
        lines += _thing_facts(wheel, thing)
    return "\n".join([*lines, " )"])


def _thing_facts(wheel: Wheel, thing: _Thing) -> list[str]:
    facts = [
        f"  (objectType {thing.id} {thing.type}Type)",
        f"  (inReceptacle {thing.id} {thing.place.id})",
        f"  (objectAtLocation {thing.id} {thing.place.location})",
    ]
    if thing.type in _LAMP_STANDS:
        return [*facts, f"  (toggleable {thing.id})"]
    facts.append(f"  (pickupable {thing.id})")
    return facts + [f"  ({verb.lower()} {thing.id})" for verb in _ABILITIES if thing.type in wheel.able[verb]]


def _goal(wheel: Wheel, room: _Room, names: Mapping[str, str], wish: _Wish, item: str, template: int) -> Goal:
    pddl, sentences = wheel.goals[wish.task_type]
    toggle = wish.lamp or ""
    words = {"obj": item.lower(), "recep": wish.receptacle.lower(), "toggle": toggle.lower()}
    goal = pddl.format(obj=item, recep=wish.receptacle, toggle=toggle)
    return Goal(item, sentences[template].format(**words), goal, _Walk(wheel, room, names).plan(wish, item))


class _Walk:
    """Writes down the commands of someone who knows where everything is."""

    def __init__(self, wheel: Wheel, room: _Room, names: Mapping[str, str]) -> None:
        self.openable = wheel.openable
        self.room = room
        self.names = names
        self.commands: list[str] = []
        self.location = START
        self.opened: set[str] = set()

    def plan(self, wish: _Wish, item: str) -> tuple[str, ...]:
        things = [thing for thing in self.room.things if thing.type == item]
        if wish.lamp:
            lamp = next(lamp for lamp in self.room.lamps if lamp.type == wish.lamp)
            self._take(things[0])
            self._go(lamp.place)
            self.commands.append(f"use {self.names[lamp.id]}")
            return tuple(self.commands)
        target = next(r for r in self.room.receptacles if r.type == wish.receptacle)
        for thing in things[: 2 if wish.task_type == "pick_two_obj_and_place" else 1]:
            self._take(thing)
            if wish.task_type in _TOOLS:
                self._treat(thing, *_TOOLS[wish.task_type][1:])
            self._go(target, open_it=True)
            self.commands.append(f"move {self.names[thing.id]} to {self.names[target.id]}")
        return tuple(self.commands)

    def _go(self, place: Receptacle, open_it: bool = False) -> None:
        # From one view point to itself there is no way to go.
        if place.location != self.location:
            self.commands.append(f"go to {self.names[place.id]}")
            self.location = place.location
        if open_it and place.type in self.openable and place.id not in self.opened:
            self.commands.append(f"open {self.names[place.id]}")
            self.opened.add(place.id)

    def _take(self, thing: _Thing) -> None:
        self._go(thing.place, open_it=True)
        self.commands.append(f"take {self.names[thing.id]} from {self.names[thing.place.id]}")

    def _treat(self, thing: _Thing, tool: str, verb: str) -> None:
        place = next(r for r in self.room.receptacles if r.type == tool)
        self._go(place)
        self.commands.append(f"{verb} {self.names[thing.id]} with {self.names[place.id]}")
