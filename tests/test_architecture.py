"""The house stands as it was drawn: floors, light imports, no privilege for built-ins, every config loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agentrl
from agentrl.algorithms.recipe import recipe_names
from agentrl.run.settings import RunConfig, config_tree, load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "agentrl"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

FLOORS = {
    "errors": -1,  # the ground that every floor stands on
    "plugins": 0,
    "seeds": 0,
    "schedule": 0,
    "config": 0,
    "files": 0,
    "values": 0,
    "terminal": 0,
    "scaffold": 0,
    "env": 1,
    "data": 1,
    "policy": 2,
    "algorithms": 2,
    "rollout": 3,
    "learn": 3,
    "scale": 4,
    "run": 5,
    "evaluation": 6,
    "planning": 7,
    "training": 8,
    "study": 9,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
}
HEAVY = {"torch", "ray", "vllm", "transformers", "matplotlib"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of agentrl that a file imports, anywhere in it."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module] if node.module != "agentrl" else [f"agentrl.{a.name}" for a in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("agentrl.")}
    return rooms


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        assert FLOORS[other] < FLOORS[room], f"{path.name} (floor {FLOORS[room]}) imports {other}"


def module_name(path: Path) -> str:
    parts = (
        path.relative_to(ROOT / "envs" if path.is_relative_to(ROOT / "envs") else ROOT).with_suffix("").parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of the project that a file imports, anywhere in it; under TYPE_CHECKING, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module}
    return (found & known) - {module_name(path)}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a module, what it imports, and so on, back to the module; nothing if there is no circle."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for other in sorted(graph[path[-1]] - done):
            if other in path:
                return [*path[path.index(other) :], other]
            if circle := walk([*path, other]):
                return circle
        done.add(path[-1])
        return []

    return next((circle for module in sorted(graph) if (circle := walk([module]))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {module_name(path): path for path in [*SOURCES, *(ROOT / "envs").rglob("*.py")]}
    graph = {name: imported_modules(path, set(files)) for name, path in files.items()}
    assert sum(map(len, graph.values())) > 500
    assert find_circle(graph) == []
    assert find_circle(graph | {"agentrl.errors": {"agentrl.cli"}})[:1] == ["agentrl.cli"]


ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_in_one_sentence_what_it_is_for(room: Path) -> None:
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert docstring is not None
    first = " ".join(docstring.split("\n\n")[0].split())
    assert first.endswith("."), first
    assert first.count(". ") == 0, first
    assert 30 < len(first) < 160, first


METHODS = sorted((PACKAGE / "algorithms" / "methods").glob("*.py"))
MOST_LINES = {"aepo": 200, "epo": 165, "fr3e": 200, "spear": 160}  # docstrings included


def test_the_lines_of_the_longest_methods_are_counted() -> None:
    assert set(MOST_LINES) < {path.stem for path in METHODS}


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES.get(path.stem, 225)


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in SOURCES} <= set(FLOORS)


def test_the_framework_never_names_the_built_in_environments() -> None:
    assert [
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and b"agentrl_envs" in path.read_bytes() and path.suffix != ".pyc"
    ] == []


def test_environments_import_only_the_env_room_and_errors() -> None:
    for path in (ROOT / "envs").rglob("*.py"):
        assert imported_rooms(path) <= {"env", "errors"}, path


def test_nothing_imports_the_folders_beside_the_packages() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "envs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in {"tests", "scripts", "configs"}, path


@pytest.mark.parametrize(
    "statement", ["import agentrl", "import agentrl.cli", "import agentrl.env", "import agentrl.rollout"]
)
def test_importing_is_light(statement: str) -> None:
    code = f"import sys\n{statement}\nprint(*sorted({HEAVY!r} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_lazy_names_are_real() -> None:
    for name in agentrl.__all__:
        assert getattr(agentrl, name) is not None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    from agentrl.config import to_yaml

    config = load_config(path)
    again = tmp_path / path.name
    again.write_text(to_yaml(config_tree(config)))
    assert load_config(again) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_over_every_config(path: Path, name: str) -> None:
    assert load_config(path, f"algorithm.name={name}").algorithm.build() is not None


def test_the_quickstart_is_the_defaults() -> None:
    assert load_config(ROOT / "configs" / "quickstart.yaml") == RunConfig()
