"""Sample the content of a room for a goal, write it as PDDL, and write a walkthrough to the goal."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random

from agentrl_envs.alfworld.package_data import FloorPlan, PackageData, Receptacle, location_id

START = location_id(0, 0, 0, 0)

TOOLS = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin", "clean"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave", "heat"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge", "cool"),
}
_ABILITIES = ("Cleanable", "Heatable", "Coolable", "Sliceable")
LAMP_STANDS = {
    "DeskLamp": frozenset({"Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "DiningTable", "TVStand"}),
    "FloorLamp": frozenset(
        {"SideTable", "Dresser", "ArmChair", "Sofa", "Desk", "TVStand", "CoffeeTable", "Bed"}
    ),
}
# Number of pieces of furniture that a scene has without a position in its floor plan; others occur once.
_USUAL_COUNT = {"StoveBurner": 4, "Cabinet": 4, "Drawer": 4, "Shelf": 3}
_RULES_NEED_OBJECT = ("ButterKnife", "Knife")
_RULES_NEED_RECEPTACLE = ("Fridge", "Microwave", "SinkBasin")
_INSTANCES = (1, 2, 3)
_INSTANCE_WEIGHTS = (9, 16, 20)  # cumulative: 45, 35 and 20 %


@dataclass(frozen=True, slots=True)
class Thing:
    """A movable object or a lamp, and the receptacle that it lies in."""

    id: str
    type: str
    place: Receptacle


@dataclass(frozen=True, slots=True)
class GoalSpec:
    """The goal that a room is generated for."""

    task_type: str
    object: str
    receptacle: str
    lamp: str | None


@dataclass(frozen=True, slots=True)
class Scene:
    """A floor plan and its possible goals: task type -> object -> receptacle types (lamps for look)."""

    plan: FloorPlan
    furniture: tuple[str, ...]
    objects: tuple[str, ...]
    possible_goals: Mapping[str, Mapping[str, tuple[str, ...]]]


def fitting_receptacles(data: PackageData, item: str, furniture: Iterable[str]) -> list[str]:
    """Return the receptacle types that an object type fits into."""
    return [kind for kind in furniture if item in data.holds[kind]]


class Room:
    """Receptacles and objects of one game, sampled so that neither goal holds at the start."""

    def __init__(
        self,
        rng: Random,
        data: PackageData,
        scene: Scene,
        spec: GoalSpec,
        other_object: str | None,
        max_receptacles: int | None,
        object_types: int | None,
    ) -> None:
        self.rng = rng
        self.data = data
        # A goal object must not start in its target; for look tasks its place does not matter.
        self.forbidden = None if spec.lamp else spec.receptacle
        self.goal_objects = (spec.object,) if other_object is None else (spec.object, other_object)
        self.receptacles = self._place_receptacles(scene, spec, max_receptacles)
        self.lamps = self._place_lamps(scene, spec)
        self.things = self._place_objects(scene, spec, object_types)
        self.locations = sorted({START, *(receptacle.location for receptacle in self.receptacles)})
        self.ids = [thing.id for thing in self.lamps + self.things]
        self.ids += [receptacle.id for receptacle in self.receptacles]

    def _place_receptacles(self, scene: Scene, spec: GoalSpec, limit: int | None) -> list[Receptacle]:
        present = list(scene.plan.receptacles)
        used = {receptacle.location for receptacle in present} | {START}
        known = {receptacle.type for receptacle in present}
        for kind in scene.furniture:
            if kind not in known:
                count = 1 if limit is not None else _USUAL_COUNT.get(kind, 1)
                present += [self._at_random_location(kind, used) for _ in range(count)]
        if limit is None:
            return present
        by_type: dict[str, list[Receptacle]] = {}
        for receptacle in present:
            by_type.setdefault(receptacle.type, []).append(receptacle)
        keep = self._required(scene, spec)
        rest = sorted(by_type.keys() - keep)
        self.rng.shuffle(rest)
        chosen = sorted(keep) + rest[: max(0, limit - len(keep))]
        return [self.rng.choice(by_type[kind]) for kind in chosen]

    def _required(self, scene: Scene, spec: GoalSpec) -> set[str]:
        """Return the receptacle types that both goals need: target, tool, and places for the objects."""
        keep = {spec.receptacle}
        if spec.task_type in TOOLS:
            keep.add(TOOLS[spec.task_type][1])
        for item in self.goal_objects:
            fitting = [
                kind
                for kind in fitting_receptacles(self.data, item, scene.furniture)
                if kind != self.forbidden
            ]
            if not keep.intersection(fitting):
                keep.add(self.rng.choice(fitting))
        return keep

    def _at_random_location(self, kind: str, used: set[str]) -> Receptacle:
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
        numbers = [f"{'_minus_' if draw() < 0.5 else '_plus_'}{draw() * 4:05.2f}" for _ in range(3)]
        name = "_bar_".join([kind.removesuffix("Basin"), *numbers]).replace(".", "_dot_")
        return f"{name}_bar_{kind}" if kind.endswith("Basin") else name

    def _place_lamps(self, scene: Scene, spec: GoalSpec) -> list[Thing]:
        lamps = []
        for lamp, stands in LAMP_STANDS.items():
            if lamp not in scene.plan.types:
                continue
            places = [r for r in self.receptacles if r.type in stands]
            if lamp == spec.lamp:
                places = [r for r in places if r.type == spec.receptacle]
            if places:
                lamps.append(Thing(self._new_id(lamp), lamp, self.rng.choice(places)))
        return lamps

    def _place_objects(self, scene: Scene, spec: GoalSpec, limit: int | None) -> list[Thing]:
        places = {kind: self._places(kind) for kind in scene.objects}
        possible = [kind for kind in scene.objects if places[kind] and kind not in self.goal_objects]
        if limit is not None:
            extra = max(0, limit - len(self.goal_objects))
            possible = self.rng.sample(possible, min(extra, len(possible)))
        things = []
        for kind in sorted({*possible, *self.goal_objects}):
            (count,) = self.rng.choices(_INSTANCES, cum_weights=_INSTANCE_WEIGHTS)
            if kind in self.goal_objects and spec.task_type == "pick_two_obj_and_place":
                count = max(2, count)
            things += [Thing(self._new_id(kind), kind, self.rng.choice(places[kind])) for _ in range(count)]
        return things

    def _places(self, kind: str) -> list[Receptacle]:
        avoided = self.forbidden if kind in self.goal_objects else None
        holds = self.data.holds
        return [r for r in self.receptacles if r.type != avoided and kind in holds[r.type]]


def room_text(data: PackageData, name: str, room: Room) -> str:
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
        if receptacle.type in data.openable:
            lines.append(f"  (openable {receptacle.id})")
    for kind in receptacle_types:
        held = data.holds[kind]
        lines += [f"  (canContain {kind}Type {item}Type)" for item in object_types if item in held]
    for thing in things:
        lines += _thing_facts(data, thing)
    return "\n".join([*lines, " )"])


def _thing_facts(data: PackageData, thing: Thing) -> list[str]:
    facts = [
        f"  (objectType {thing.id} {thing.type}Type)",
        f"  (inReceptacle {thing.id} {thing.place.id})",
        f"  (objectAtLocation {thing.id} {thing.place.location})",
    ]
    if thing.type in LAMP_STANDS:
        return [*facts, f"  (toggleable {thing.id})"]
    facts.append(f"  (pickupable {thing.id})")
    return facts + [f"  ({verb.lower()} {thing.id})" for verb in _ABILITIES if thing.type in data.able[verb]]


class WalkthroughWriter:
    """Writer of a solution that uses the full state of a room."""

    def __init__(self, data: PackageData, room: Room, names: Mapping[str, str]) -> None:
        self.openable = data.openable
        self.room = room
        self.names = names
        self.commands: list[str] = []
        self.location = START
        self.opened: set[str] = set()

    def plan(self, spec: GoalSpec, item: str) -> tuple[str, ...]:
        """Return the commands that reach a goal for an object type."""
        things = [thing for thing in self.room.things if thing.type == item]
        if spec.lamp:
            lamp = next(lamp for lamp in self.room.lamps if lamp.type == spec.lamp)
            self._take(things[0])
            self._go(lamp.place)
            self.commands.append(f"use {self.names[lamp.id]}")
            return tuple(self.commands)
        target = next(r for r in self.room.receptacles if r.type == spec.receptacle)
        for thing in things[: 2 if spec.task_type == "pick_two_obj_and_place" else 1]:
            self._take(thing)
            if spec.task_type in TOOLS:
                self._treat(thing, *TOOLS[spec.task_type][1:])
            self._go(target, open_it=True)
            self.commands.append(f"move {self.names[thing.id]} to {self.names[target.id]}")
        return tuple(self.commands)

    def _go(self, place: Receptacle, open_it: bool = False) -> None:
        # The rules admit no move from a view point to itself.
        if place.location != self.location:
            self.commands.append(f"go to {self.names[place.id]}")
            self.location = place.location
        if open_it and place.type in self.openable and place.id not in self.opened:
            self.commands.append(f"open {self.names[place.id]}")
            self.opened.add(place.id)

    def _take(self, thing: Thing) -> None:
        self._go(thing.place, open_it=True)
        self.commands.append(f"take {self.names[thing.id]} from {self.names[thing.place.id]}")

    def _treat(self, thing: Thing, tool: str, verb: str) -> None:
        place = next(r for r in self.room.receptacles if r.type == tool)
        self._go(place)
        self.commands.append(f"{verb} {self.names[thing.id]} with {self.names[place.id]}")
