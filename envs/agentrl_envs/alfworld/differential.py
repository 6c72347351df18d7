"""Play the same commands with our engine and with TextWorld's, and compare everything that either tells."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentrl_envs.alfworld.engine import Game, Snapshot
from agentrl_envs.alfworld.games import game_file
from agentrl_envs.alfworld.generate import TASK_TYPES, Options, generate
from agentrl_envs.alfworld.pddl import GameFileError
from agentrl_envs.alfworld.reference import ReferenceEngine

INVALID = (
    *(
        "",
        " ",
        "\n",
        "LOOK",
        "Look",
        "look around",
        '"look"',
        "#look#",
        "//look",
        "{r}",
        "[x]",
        "quit",
        "take",
    ),
    *("go to", "go to nowhere 1", "use knife 1", "take a mug 1 from the desk 1", "go to desk 1, and open it"),
    *("examine agent1", "inventory; look", "put mug 1 in desk 1"),
)
ODD_SENTENCES = (
    *(
        "put a mug; then rest",
        'find "the" mug',
        'say "hi',
        "// put it away",
        "see [it]",
        "tab\tbed",
        "#intro",
    ),
    *(
        "this | that",
        "a < b",
        "  put it away  ",
        "back\\nslash",
        "put it away.",
        "put {it} away",
        "",
        "100 %",
    ),
)


@dataclass(slots=True)
class Tally:
    """What was compared; `differences` holds a sentence for each thing that was not equal."""

    games: int = 0
    refused_by_both: int = 0
    comparisons: int = 0
    steps: int = 0
    verbs: Counter[str] = field(default_factory=Counter)
    task_types: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def compare(self, place: str, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
        self.comparisons += 1
        names = ("observation", "admissible", "won", "moves", "score", "done")
        for name, left, right in zip(names, ours, theirs, strict=True):
            if left != right:
                self.differences.append(f"{place}: {name}: ours {left!r}, TextWorld's {right!r}")


def files(count: int, seed: int, mutate: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Generate (name, task type, game file): task types in turn, all splits, whole and small rooms."""
    rooms = (
        Options(max_receptacles=6, object_types=8),
        Options(),
        Options(max_receptacles=8, object_types=12),
    )
    for number in range(count):
        split = ("train", "valid_unseen", "valid_seen")[number // len(TASK_TYPES) % 3]
        made = generate(split, (seed * 601 + number // 6) % 160 * 6 + number % 6, rooms[number // 2 % 3])
        file = game_file(made)
        rng = Random(f"mutate {seed} {number}")
        yield made.task, made.task_type, mutated(file, rng) if mutate else file


def mutated(file: Mapping[str, Any], rng: Random) -> dict[str, Any]:
    """Make a game odd in some way that the generator never does."""
    lines = file["pddl_problem"].split("\n")
    changes = rng.sample([_start_at_receptacle, _opened, _moved_together, _states, _inside, _sentence], 2)
    result = dict(file)
    for change in changes:
        if change is _sentence:
            sentence = rng.choice(ODD_SENTENCES)
            told = re.compile(r"(?<=Your task is to: )[^\n]*?(?=\.\")")
            result["grammar"] = told.sub(
                json.dumps(sentence)[1:-1].replace("\\", "\\\\"), result["grammar"], 1
            )
        else:
            lines = change(lines, rng)
    result["pddl_problem"] = "\n".join(lines)
    return result


def _facts(lines: list[str], predicate: str) -> list[list[str]]:
    return [line.strip(" ()").split() for line in lines if line.startswith(f"  ({predicate} ")]


def _start_at_receptacle(lines: list[str], rng: Random) -> list[str]:
    location = rng.choice(_facts(lines, "receptacleAtLocation"))[2]
    return [f"  (atLocation agent1 {location})" if "(atLocation" in line else line for line in lines]


def _opened(lines: list[str], rng: Random) -> list[str]:
    openable = _facts(lines, "openable")
    extra = [f"  (opened {row[1]})" for row in openable if rng.random() < 0.6]
    return _with_facts(lines, extra)


def _moved_together(lines: list[str], rng: Random) -> list[str]:
    places = _facts(lines, "receptacleAtLocation")
    point = rng.choice(places)[2]
    for row in rng.sample(places, min(3, len(places))):
        lines = [
            line.replace(row[2], point) if "AtLocation" in line and "agent1" not in line else line
            for line in lines
        ]
    return lines


def _states(lines: list[str], rng: Random) -> list[str]:
    words = ("isHot", "isCool", "isClean", "isSliced", "isToggled", "isOn")
    items = _facts(lines, "objectType")
    return _with_facts(lines, [f"  ({rng.choice(words)} {row[1]})" for row in items if rng.random() < 0.5])


def _inside(lines: list[str], rng: Random) -> list[str]:
    items = [row[1] for row in _facts(lines, "pickupable")]
    outer = rng.choice(items)
    extra = [f"  (inReceptacleObject {item} {outer})" for item in rng.sample(items, min(2, len(items)))]
    return _with_facts(lines, [*extra, f"  (isReceptacleObject {outer})"])


def _sentence(lines: list[str], rng: Random) -> list[str]:
    return lines


def _with_facts(lines: list[str], extra: Iterable[str]) -> list[str]:
    place = lines.index(" (:init") + 1
    return [*lines[:place], *dict.fromkeys(extra), *lines[place:]]


def compare_game(
    engine: ReferenceEngine, name: str, file: Mapping[str, Any], tally: Tally, *, steps: int, seed: int
) -> None:
    """Play one game on both: mixed commands with resets in between, the walkthrough, and on after done."""
    rng = Random(f"differential {seed} {name}")
    game, error = _try(lambda: Game(file["pddl_domain"], file["pddl_problem"], file["grammar"]))
    if game is not None and game.start.won:
        return  # TextWorld's translator cannot read a goal that is already reached
    theirs, their_error = _try(lambda: engine.begin(file))
    if game is None or theirs is None:
        if (game is None) != (theirs is None):
            tally.differences.append(f"{name}: ours {error or 'loads'}, TextWorld {their_error or 'loads'}")
        tally.refused_by_both += game is None and theirs is None
        return
    tally.games += 1
    ours = game.start
    _compare_start(tally, name, ours, theirs)
    plan = tuple(file["walkthrough"])
    for number in range(steps):
        if rng.random() < 0.02:
            ours = game.start
            _compare_start(tally, f"{name}, reset before step {number}", ours, engine.reset())
        ours = _step_both(engine, game, ours, _mixed(rng, ours, plan), tally, f"{name}, step {number}")
    ours = game.start
    _compare_start(tally, f"{name}, second reset", ours, engine.reset())
    for command in plan:
        ours = _step_both(engine, game, ours, command, tally, f"{name}, walkthrough")
    for _ in range(8):
        ours = _step_both(engine, game, ours, _mixed(rng, ours, plan), tally, f"{name}, after done")


def _try(make: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return make(), None
    except (GameFileError, Exception, SystemExit) as error:  # the reference fails in many ways on bad files
        return None, f"refuses ({type(error).__name__}: {str(error)[:80]})"


def _compare_start(tally: Tally, place: str, ours: Snapshot, theirs: Snapshot) -> None:
    tally.compare(place, (*_shown(ours), 0, False), (*_shown(theirs), 0, False))


def _shown(moment: Snapshot) -> tuple[Any, ...]:
    return moment.observation, moment.admissible, moment.won, moment.moves


def _step_both(
    engine: ReferenceEngine, game: Game, ours: Snapshot, command: str, tally: Tally, place: str
) -> Snapshot:
    tally.steps += 1
    tally.verbs[command.split()[0] if command in ours.admissible else "invalid"] += 1
    after = game.advance(ours, command)
    theirs, score, done = engine.step(command)
    tally.compare(
        f"{place}, {command!r}", (*_shown(after), int(after.won), after.won), (*_shown(theirs), score, done)
    )
    return after


def _mixed(rng: Random, moment: Snapshot, plan: tuple[str, ...]) -> str:
    draw = rng.random()
    if draw < 0.45:
        verbs: dict[str, list[str]] = {}
        for command in moment.admissible:
            verbs.setdefault(command.split()[0], []).append(command)
        return rng.choice(verbs[rng.choice(sorted(verbs))])
    if draw < 0.65:
        return rng.choice(moment.admissible)
    if draw < 0.8 and plan:
        return rng.choice(plan)
    if draw < 0.9:
        return rng.choice(INVALID)
    if draw < 0.93:
        return rng.choice([" {} ", "{}\n", "{}  "]).format(rng.choice(moment.admissible))
    return rng.choice(("help", "look", "inventory"))


def run(
    count: int, *, steps: int, seed: int = 0, mutate: bool = False, report: Callable[[str], None] = print
) -> Tally:
    """Compare `count` games; `report` gets a line per game."""
    engine = ReferenceEngine()
    tally = Tally()
    try:
        for name, task_type, file in files(count, seed, mutate):
            before = tally.comparisons
            compare_game(engine, name, file, tally, steps=steps, seed=seed)
            made = tally.comparisons - before
            tally.task_types[task_type] += made > 0
            report(f"{name} {task_type}: {made} comparisons, {len(tally.differences)} differences so far")
    finally:
        engine.close()
    return tally
