"""Data files of the alfworld package: rules, text grammar, floor plans and affordances.

The package itself is never imported: its files are located, checked against known SHA-256 sums, and read as
data.
"""

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentrl.errors import MissingDependencyError

INSTALL_COMMAND = "pip install --no-deps alfworld==0.4.2"
MOVABLE = frozenset({"Bowl", "Box", "Cup", "Mug", "Pan", "Plate", "Pot"})
SHA256 = {
    "data/alfred.pddl": "f1473041ed01da514de1f87adfd7ef0804862361f83ccf63c75e43633b0eb280",
    "data/alfred.twl2": "c5b22f0f73309a7fd7c8e5b71de42ad4803b60766ab4a51cc2feb34162be036b",
    "gen/constants.py": "2bd365f5bbca9bfa53b590421af36a0c58a1e074d0582cbc5f174078f16b7377",
    "gen/goal_library.py": "132b9407facbde7f7fc0f31e913f4678cc95a19bfb5f282cb827197da7f02dbc",
}
# Hash of all layout JSON files sorted by name, each as name, zero byte, content.
LAYOUTS_SHA256 = "4f6cf0a16342ac88ccbde3842d66e21ec2fe6a10e4360e6736c0216ab51be1f8"


@dataclass(frozen=True, slots=True)
class Receptacle:
    """A place for objects: its PDDL id, its type, and the id of the point that it is seen from."""

    id: str
    type: str
    location: str


@dataclass(frozen=True, slots=True)
class FloorPlan:
    """One scene: the receptacles with a known position, and the types of everything in it."""

    number: int
    receptacles: tuple[Receptacle, ...]
    types: frozenset[str]


@dataclass(frozen=True, slots=True)
class PackageData:
    """Content of the package's data files.

    `holds` maps a receptacle type to the object types that fit into it; `able` maps Heatable, Coolable,
    Cleanable, Toggleable and Sliceable to object types; `goals` maps a task type to the PDDL of its goal and
    its sentences.
    """

    domain: str
    grammar: str
    plans: Mapping[int, FloorPlan]
    holds: Mapping[str, frozenset[str]]
    able: Mapping[str, frozenset[str]]
    openable: frozenset[str]
    goals: Mapping[str, tuple[str, tuple[str, ...]]]


@lru_cache(maxsize=1)
def load_package_data() -> PackageData:
    """Locate, check and read the files, once per process.

    Raises:
        MissingDependencyError: The package is not installed, or its files are not those of version 0.4.2.
    """
    root = _locate()
    texts = {name: _checked(root / name, expected) for name, expected in SHA256.items()}
    constants = _literals(texts["gen/constants.py"])
    holds = {
        kind: frozenset(item for item in items if not item.endswith("Sliced"))
        for kind, items in constants["VAL_RECEPTACLE_OBJECTS"].items()
    }
    for table in ("DiningTable", "CoffeeTable", "SideTable"):
        holds[table] = holds["TableTop"]
    del holds["TableTop"]
    return PackageData(
        domain=texts["data/alfred.pddl"],
        grammar=texts["data/alfred.twl2"],
        plans=_plans(root / "gen/layouts", holds),
        holds=holds,
        able={verb: frozenset(items) for verb, items in constants["VAL_ACTION_OBJECTS"].items()},
        openable=frozenset(constants["OPENABLE_CLASS_LIST"]),
        goals=_goals(texts["gen/goal_library.py"]),
    )


def _locate() -> Path:
    spec = importlib.util.find_spec("alfworld")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise MissingDependencyError(f"ALFWorld's game files are not installed; run: {INSTALL_COMMAND}")
    return Path(places[0])


def _checked(path: Path, expected: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingDependencyError(f"cannot read {path} ({error}); run: {INSTALL_COMMAND}") from error
    _compare(path, content, expected)
    return content.decode()


def _compare(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise MissingDependencyError(
            f"{path} is not the file of alfworld 0.4.2 (SHA-256 {found[:12]}…, wanted {expected[:12]}…); "
            f"run: {INSTALL_COMMAND} --force-reinstall"
        )


def _literals(source: str) -> dict[str, Any]:
    """Return the module-level assignments whose value is a literal."""
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def _goals(source: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    goals = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            goal = ast.literal_eval(node.value)
            # The library writes '#' for '-', and ends with the parenthesis that closes the entire problem.
            goals[str(ast.literal_eval(node.targets[0].slice))] = (
                goal["pddl"].replace("#", "-"),
                tuple(goal["templates"]),
            )
    return goals


def _plans(folder: Path, holds: Mapping[str, frozenset[str]]) -> dict[int, FloorPlan]:
    contents = {path.name: path.read_bytes() for path in sorted(folder.glob("FloorPlan*.json"))}
    joined = b"".join(name.encode() + b"\0" + content for name, content in sorted(contents.items()))
    _compare(folder, joined, LAYOUTS_SHA256)
    plans = {}
    for name, content in contents.items():
        if not name.endswith("-openable.json"):
            continue
        number = int(name.removeprefix("FloorPlan").removesuffix("-openable.json"))
        items = [_receptacle(key, point) for key, point in json.loads(content).items()]
        plans[number] = FloorPlan(
            number,
            tuple(item for item in items if item.type in holds),
            frozenset(json.loads(contents[f"FloorPlan{number}-objects.json"])),
        )
    return dict(sorted(plans.items()))


def _receptacle(key: str, point: list[float]) -> Receptacle:
    x, z, rotation, horizon = point
    head, *_, tail = key.split("|")
    location = (int(x * 4), int(z * 4), int(rotation) // 90, int(horizon))
    # One plan calls a bathtub's basin a SinkBasin; the game names it after the head.
    kind = f"{head}Basin" if tail.endswith("Basin") else head
    return Receptacle(pddl_id(key), kind, location_id(*location))


def location_id(x: int, z: int, rotation: int, horizon: int) -> str:
    """Return the id of a view point: position in quarter metres, quarter turns, degrees downwards."""
    return pddl_id(f"loc|{x}|{z}|{rotation}|{horizon}")


_CODES = {"|": "_bar_", "-": "_minus_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}


def pddl_id(name: str) -> str:
    """Escape a simulator's id for PDDL."""
    return re.sub(r"[|\-+.,]", lambda match: _CODES[match[0]], name)
