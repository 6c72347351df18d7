"""Game files for testing an engine: as the generator makes them, or modified in ways that it never does."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

from agentrl_envs.alfworld.games import game_file
from agentrl_envs.alfworld.generate import TASK_TYPES, Options, generate

ROOMS = (
    Options(max_receptacles=6, object_types=8),
    Options(),
    Options(max_receptacles=8, object_types=12),
)
SENTENCES = (
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


def files(count: int, seed: int, adversarial: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (name, task type, game file), cycling through task types, splits and room sizes.

    Args:
        count: The number of games.
        seed: The seed that selects the games and the changes.
        adversarial: Whether to apply two random `CHANGES` to each file.
    """
    for number in range(count):
        split = ("train", "valid_unseen", "valid_seen")[number // len(TASK_TYPES) % 3]
        index = (seed * 601 + number // len(TASK_TYPES)) % 160 * len(TASK_TYPES) + number % len(TASK_TYPES)
        made = generate(split, index, ROOMS[number // 2 % len(ROOMS)])
        file = game_file(made)
        if adversarial:
            rng = Random(f"odd {seed} {number}")
            for change in rng.sample(CHANGES, 2):
                change(file, rng)
        yield made.task, made.task_type, file


def _facts(file: dict[str, Any], predicate: str) -> list[list[str]]:
    """Return the facts of a predicate, each as the words of its line."""
    lines = file["pddl_problem"].split("\n")
    return [line.strip(" ()").split() for line in lines if line.startswith(f"  ({predicate} ")]


def _add(file: dict[str, Any], facts: Iterable[str]) -> None:
    start = " (:init\n"
    added = "".join(f"  ({fact})\n" for fact in dict.fromkeys(facts))
    file["pddl_problem"] = file["pddl_problem"].replace(start, start + added)


def start_at_receptacle(file: dict[str, Any], rng: Random) -> None:
    """Start the agent at some receptacle."""
    location = rng.choice(_facts(file, "receptacleAtLocation"))[2]
    file["pddl_problem"] = re.sub(
        r"\(atLocation agent1 \w+\)", f"(atLocation agent1 {location})", file["pddl_problem"]
    )


def open_some(file: dict[str, Any], rng: Random) -> None:
    """Open some containers from the start."""
    _add(file, [f"opened {row[1]}" for row in _facts(file, "openable") if rng.random() < 0.6])


def move_together(file: dict[str, Any], rng: Random) -> None:
    """Move several receptacles to one view point."""
    places = _facts(file, "receptacleAtLocation")
    point = rng.choice(places)[2]
    for row in rng.sample(places, min(3, len(places))):
        file["pddl_problem"] = re.sub(
            rf"(\((?:receptacle|object)AtLocation \w+) {row[2]}\)", rf"\1 {point})", file["pddl_problem"]
        )


def give_states(file: dict[str, Any], rng: Random) -> None:
    """Make objects hot, cool, clean, sliced, toggled or on from the start."""
    words = ("isHot", "isCool", "isClean", "isSliced", "isToggled", "isOn")
    _add(file, [f"{rng.choice(words)} {row[1]}" for row in _facts(file, "objectType") if rng.random() < 0.5])


def put_inside(file: dict[str, Any], rng: Random) -> None:
    """Put objects into another object."""
    items = [row[1] for row in _facts(file, "pickupable")]
    outer = rng.choice(items)
    inner = rng.sample(items, min(2, len(items)))
    _add(file, [*(f"inReceptacleObject {item} {outer}" for item in inner), f"isReceptacleObject {outer}"])


def mistype(file: dict[str, Any], rng: Random) -> None:
    """Put an object into another as if that were a receptacle, against the declared types."""
    items = [row[1] for row in _facts(file, "objectType")]
    _add(file, [f"inReceptacle {rng.choice(items)} {rng.choice(items)}" for _ in range(3)])


def use_special_characters(file: dict[str, Any], rng: Random) -> None:
    """State the task in a sentence with characters that are special in the text grammar."""
    sentence = json.dumps(rng.choice(SENTENCES))[1:-1]
    file["grammar"] = re.sub(
        r"(?<=Your task is to: )[^\n]*?(?=\.\")", lambda _: sentence, file["grammar"], count=1
    )


def use_older_words(file: dict[str, Any], rng: Random) -> None:
    """Use the texts of earlier ALFWorld releases: `put X in/on Y`, and arriving at a numbered place."""
    for new, old in (
        ('"move {o} to {r}"', '"put {o} in/on {r}"'),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        ('"go to [{r.name | receptacleatlocation(r:receptacle, lend:location)}]"', '"go to {r}"'),
        (
            "You arrive at {r.name}. #examineReceptacle.feedback#",
            "You arrive at {lend.id}. [{r.name or r.id | receptacleatlocation(r:receptacle, lend:location)}]",
        ),
    ):
        file["grammar"] = file["grammar"].replace(new, old)


CHANGES: tuple[Callable[[dict[str, Any], Random], None], ...] = (
    start_at_receptacle,
    open_some,
    move_together,
    give_states,
    put_inside,
    mistype,
    use_special_characters,
    use_older_words,
)
