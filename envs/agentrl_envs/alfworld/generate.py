"""Generate games from ALFWorld's floor plans, rules, sentences and affordances, with randomly placed objects.

A game is a pure function of (split, index, options). The scenes of `valid_unseen` occur in no other split.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from agentrl.env.numbers import whole_number
from agentrl.errors import ConfigError
from agentrl_envs.alfworld.engine import display_names
from agentrl_envs.alfworld.package_data import MOVABLE, FloorPlan, PackageData, load_package_data
from agentrl_envs.alfworld.rooms import (
    LAMP_STANDS,
    TOOLS,
    GoalSpec,
    Room,
    Scene,
    WalkthroughWriter,
    fitting_receptacles,
    room_text,
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


@dataclass(frozen=True, slots=True)
class Options:
    """Restrictions on the generated games; None means no restriction.

    `max_receptacles` keeps one receptacle per type and at most this many in all, including those that the
    goal needs; `object_types` is the number of types of movable objects in the room.
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
            if value is not None:
                whole_number(name, value, least)


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal: its sentence, its condition in PDDL, and a list of commands that reach it."""

    object: str
    sentence: str
    pddl: str
    walkthrough: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GeneratedGame:
    """One game; `other` is a goal of the same type for another object of this room, if there is one."""

    task: str
    task_type: str
    scene: int
    receptacle: str
    room: str
    goal: Goal
    other: Goal | None

    @property
    def problem(self) -> str:
        """Return the PDDL problem."""
        return self.room + self.goal.pddl

    @property
    def grammar(self) -> str:
        """Return the text grammar with the goal sentence filled in."""
        return load_package_data().grammar.replace("UNKNOWN GOAL", self.goal.sentence)

    def swapped(self) -> "GeneratedGame":
        """Return the same room with the two goals exchanged."""
        if self.other is None:
            raise ConfigError(f"task {self.task!r} has no other goal")
        return GeneratedGame(
            self.task, self.task_type, self.scene, self.receptacle, self.room, self.other, self.goal
        )

    def hash(self) -> str:
        """Hash everything that the game consists of."""
        parts = (load_package_data().domain, self.problem, self.grammar)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def scenes(split: str) -> list[int]:
    """Return the numbers of the floor plans of a split."""
    unseen = split == "valid_unseen"
    return [number for number in load_package_data().plans if (number in UNSEEN_SCENES) == unseen]


def generate(split: str, index: int, options: Options) -> GeneratedGame:
    """Generate game `index` of a split; consecutive indices cycle through the task types."""
    rng = Random(f"agentrl alfworld 1 {split} {index}")
    task_type = options.task_types[index % len(options.task_types)]
    data = load_package_data()
    scene = rng.choice(_scenes_allowing(split, task_type))
    item = rng.choice(tuple(scene.possible_goals[task_type]))
    target = rng.choice(scene.possible_goals[task_type][item])
    if task_type == "look_at_obj_in_light":
        stands = [kind for kind in scene.furniture if kind in LAMP_STANDS[target]]
        spec = GoalSpec(task_type, item, rng.choice(stands), target)
    else:
        spec = GoalSpec(task_type, item, target, None)
    alternatives = [
        kind for kind, places in scene.possible_goals[task_type].items() if kind != item and target in places
    ]
    other_object = rng.choice(alternatives) if alternatives else None
    room = Room(rng, data, scene, spec, other_object, options.max_receptacles, options.object_types)
    text = room_text(data, f"{split}_{index}", room)
    template = rng.randrange(len(data.goals[task_type][1]))
    names = dict(zip(room.ids, display_names(room.ids), strict=True))
    goals = [
        _goal(data, room, names, spec, kind, template) for kind in (item, other_object) if kind is not None
    ]
    other = goals[1] if len(goals) > 1 else None
    shown = spec.lamp or spec.receptacle
    return GeneratedGame(f"{split}/{index}", task_type, scene.plan.number, shown, text, goals[0], other)


@lru_cache(maxsize=64)
def _scenes_allowing(split: str, task_type: str) -> tuple[Scene, ...]:
    found = tuple(scene for number in scenes(split) if (scene := _scene(number)).possible_goals[task_type])
    if not found:
        raise ConfigError(f"no scene of split {split!r} allows the task type {task_type!r}")
    return found


@lru_cache(maxsize=256)
def _scene(number: int) -> Scene:
    data = load_package_data()
    plan = data.plans[number]
    movable = set().union(*data.holds.values()) - (data.holds.keys() - MOVABLE)
    fixed = {kind for kind in plan.types if kind in data.holds and kind not in MOVABLE}
    furniture = sorted(fixed | {receptacle.type for receptacle in plan.receptacles})
    objects = tuple(
        sorted(kind for kind in plan.types & movable if fitting_receptacles(data, kind, furniture))
    )
    possible_goals = {kind: _possible_goals(data, plan, furniture, objects, kind) for kind in TASK_TYPES}
    return Scene(plan, tuple(furniture), objects, possible_goals)


def _possible_goals(
    data: PackageData, plan: FloorPlan, furniture: Sequence[str], objects: Sequence[str], task_type: str
) -> dict[str, tuple[str, ...]]:
    if task_type == "look_at_obj_in_light":
        lamps = tuple(
            lamp
            for lamp, stands in LAMP_STANDS.items()
            if lamp in plan.types and stands.intersection(furniture)
        )
        return dict.fromkeys(objects, lamps) if lamps else {}
    ability, tool, _ = TOOLS.get(task_type, (None, None, None))
    if tool is not None and tool not in furniture:
        return {}
    possible_goals = {}
    for item in objects:
        fitting = fitting_receptacles(data, item, furniture)
        targets = tuple(kind for kind in fitting if kind != tool and fitting != [kind])
        if targets and (ability is None or item in data.able[ability]):
            possible_goals[item] = targets
    return possible_goals


def _goal(
    data: PackageData, room: Room, names: Mapping[str, str], spec: GoalSpec, item: str, template: int
) -> Goal:
    pddl, sentences = data.goals[spec.task_type]
    toggle = spec.lamp or ""
    words = {"obj": item.lower(), "recep": spec.receptacle.lower(), "toggle": toggle.lower()}
    goal = pddl.format(obj=item, recep=spec.receptacle, toggle=toggle)
    return Goal(
        item, sentences[template].format(**words), goal, WalkthroughWriter(data, room, names).plan(spec, item)
    )
