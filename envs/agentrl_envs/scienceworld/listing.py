"""Tasks and variations of a version of ScienceWorld, read from a file, so that listing needs no JVM.

`python -m agentrl_envs.scienceworld.listing` generates the file of the installed version and prints it.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentrl.errors import missing_extra
from agentrl_envs.scienceworld.simulator import Simulator

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Listing:
    """The tasks of one version.

    Attributes:
        version: The version of ScienceWorld.
        simplifications: The names of the simplifications, without "easy".
        solutions: Task -> number of actions in the simulator's solution of its first training variation with
            the simplification "easy"; ordered by this number.
        variations: Task -> split -> numbers of its variations; tasks are in the same order.
    """

    version: str
    simplifications: tuple[str, ...]
    solutions: Mapping[str, int]
    variations: Mapping[str, Mapping[str, tuple[int, ...]]]


@cache
def listing() -> Listing:
    """Return the listing of the installed version: the packaged one, or one generated once and cached.

    Raises:
        MissingDependencyError: ScienceWorld is not installed.
    """
    try:
        installed = version("scienceworld")
    except PackageNotFoundError as error:
        raise missing_extra("ScienceWorld is not installed", "scienceworld") from error
    name = f"listing-{installed}.json"
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "agentrl", "scienceworld", name)
    for file in (Path(__file__).with_name(name), cached):
        if file.is_file():
            return _parsed(json.loads(file.read_text()))
    tree = make_listing()
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as unfinished:
        json.dump(tree, unfinished)
    os.replace(unfinished.name, cached)
    return _parsed(tree)


def make_listing() -> dict[str, Any]:
    """Generate the listing with the installed simulator; takes a minute.

    Returns:
        The content of the file; variations are written as runs [first, one past the last].
    """
    simulator = Simulator()
    try:
        tasks: dict[str, dict[str, Any]] = {}
        for task in simulator.names("getTaskNames"):
            simulator.load(task, 0, "")
            runs = {split: _runs(simulator.numbers(f"getVariations{split.capitalize()}")) for split in SPLITS}
            simulator.load(task, runs["train"][0][0], "easy", gold=True)
            tasks[task] = {"solution": len(simulator.gold())} | runs
        known = simulator.text("getPossibleSimplifications").split(", ")
        ordered = dict(sorted(tasks.items(), key=lambda item: (item[1]["solution"], item[0])))
        return {"version": version("scienceworld"), "simplifications": known, "tasks": ordered}
    finally:
        simulator.close()


def _parsed(tree: Mapping[str, Any]) -> Listing:
    variations = {
        task: {split: tuple(n for run in facts[split] for n in range(*run)) for split in SPLITS}
        for task, facts in tree["tasks"].items()
    }
    solutions = {task: facts["solution"] for task, facts in tree["tasks"].items()}
    return Listing(tree["version"], tuple(tree["simplifications"]), solutions, variations)


def _runs(numbers: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


if __name__ == "__main__":
    made = make_listing()
    tasks = made.pop("tasks")
    lines = ",\n".join(f"    {json.dumps(task)}: {json.dumps(facts)}" for task, facts in tasks.items())
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in made.items())
    sys.stdout.write(f'{{\n{head},\n  "tasks": {{\n{lines}\n  }}\n}}\n')
