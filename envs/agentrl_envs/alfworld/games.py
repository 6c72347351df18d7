"""Sources of games: the generator, or a folder in ALFWorld's layout."""

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

from agentrl.errors import ConfigError
from agentrl_envs.alfworld.engine import Game
from agentrl_envs.alfworld.generate import SPLITS, TASK_TYPES, GeneratedGame, Options, generate
from agentrl_envs.alfworld.package_data import load_package_data
from agentrl_envs.alfworld.pddl import GameFileError
from agentrl_envs.alfworld.wording import Wanted

OTHER = "#other"


@dataclass(frozen=True, slots=True)
class LoadedGame:
    """A game and the facts about its task.

    `file` is the content of its `game.tw-pddl`; `holds` maps a receptacle class to the object classes that
    fit into it.
    """

    game: Game
    wanted: Wanted
    file: Mapping[str, Any]
    holds: Mapping[str, frozenset[str]]


class Games(Protocol):
    """Interface of a source of games; `label` is shown with every score."""

    label: str

    def tasks(self, split: str) -> Sequence[str]:
        """Return the task ids of a split."""
        ...

    def load(self, task: str) -> LoadedGame:
        """Load the game of a task."""
        ...

    def hash(self, task: str) -> str:
        """Hash everything that the game consists of."""
        ...

    def other(self, task: str) -> str | None:
        """Return the id of the same room's other task, None if there is none."""
        ...


class TaskIds(Sequence[str]):
    """Lazy sequence of the ids `split/0`, `split/1`, …."""

    def __init__(self, split: str, numbers: range) -> None:
        self.split = split
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> "TaskIds": ...

    def __getitem__(self, place: int | slice) -> "str | TaskIds":
        if isinstance(place, slice):
            return TaskIds(self.split, self.numbers[place])
        return f"{self.split}/{self.numbers[place]}"

    def __contains__(self, task: object) -> bool:
        split, _, number = task.partition("/") if isinstance(task, str) else ("", "", "")
        return (
            split == self.split
            and number.isdecimal()
            and f"{int(number)}" == number
            and int(number) in self.numbers
        )

    def __repr__(self) -> str:
        return f"TaskIds({self.split!r}, {self.numbers!r})"


class GeneratedGames:
    """Games made by the generator."""

    label = "generated"

    def __init__(self, options: Options) -> None:
        load_package_data()
        self.options = options

    def tasks(self, split: str) -> TaskIds:
        """Return the task ids of a split."""
        return TaskIds(split, range(SPLITS[split]))

    def make(self, task: str) -> GeneratedGame:
        """Generate the game of a task id; the suffix `#other` selects its other goal."""
        plain = task.removesuffix(OTHER)
        split, _, index = plain.partition("/")
        if split not in SPLITS or plain not in self.tasks(split):
            raise ConfigError(
                f"task {task!r} does not exist; wanted an id such as 'train/0' or 'valid_unseen/17{OTHER}'"
            )
        made = generate(split, int(index), self.options)
        return made if plain == task else made.swapped()

    def load(self, task: str) -> LoadedGame:
        """Load the game of a task, sharing it among the environments of this process."""
        return _shared((task, self.options), lambda: _load_generated(self.make(task)))

    def hash(self, task: str) -> str:
        """Hash everything that the game consists of."""
        return self.make(task).hash()

    def other(self, task: str) -> str | None:
        """Return the id of the same room's other task, None if there is none."""
        if task.endswith(OTHER):
            return task.removesuffix(OTHER)
        return task + OTHER if self.make(task).other else None


def _load_generated(made: GeneratedGame) -> LoadedGame:
    file = game_file(made)
    other = made.other.pddl if made.other else ""
    wanted = Wanted(made.task_type, made.goal.object, made.receptacle)
    return _loaded(_game(file, made.task, other), wanted, file)


def _loaded(game: Game, wanted: Wanted, file: Mapping[str, Any]) -> LoadedGame:
    holds: dict[str, set[str]] = {}
    for receptacle, item in game.facts(game.start, "cancontain"):
        holds.setdefault(receptacle.removesuffix("type"), set()).add(item.removesuffix("type"))
    return LoadedGame(game, wanted, file, {kind: frozenset(items) for kind, items in holds.items()})


def game_file(made: GeneratedGame) -> dict[str, Any]:
    """Return the content of a `game.tw-pddl` file."""
    return {
        "pddl_domain": load_package_data().domain,
        "grammar": made.grammar,
        "pddl_problem": made.problem,
        "solvable": True,
        "walkthrough": list(made.goal.walkthrough),
    }


def _game(file: Mapping[str, Any], place: str, other_goal: str = "") -> Game:
    for key in ("pddl_domain", "pddl_problem", "grammar"):
        if not isinstance(file.get(key), str):
            raise GameFileError(f"{place}: '{key}' must be a string, found {type(file.get(key)).__name__}")
    domain, problem, grammar = (str(file[key]) for key in ("pddl_domain", "pddl_problem", "grammar"))
    try:
        return Game(domain, problem, grammar, file.get("walkthrough") or (), other_goal)
    except GameFileError as error:
        raise type(error)(f"{place}: {error}") from error


_NAME = re.compile(r"(?P<type>[a-z_]+)-(?P<object>\w+)-(?P<inside>\w+)-(?P<place>\w+)-(?P<scene>\d+)")


class OfficialGames:
    """Games in a folder `FOLDER/SPLIT/TASK/TRIAL/game.tw-pddl`, such as ALFWorld's `json_2.1.1`.

    The folder is scanned once per split and process; a game file is read when it is first played.
    """

    label = "official"

    def __init__(self, folder: str | Path, task_types: Sequence[str] = TASK_TYPES) -> None:
        self.folder = Path(folder).expanduser()
        self.task_types = tuple(task_types)
        if not any((self.folder / split).is_dir() for split in SPLITS):
            raise ConfigError(f"data: {self.folder} has none of the folders {', '.join(SPLITS)}")

    def tasks(self, split: str) -> tuple[str, ...]:
        """Return the task ids of a split, scanning the folder the first time."""
        key = (str(self.folder.resolve()), split, self.task_types)
        with _INDEX_LOCK:
            if key not in _INDEX:
                _INDEX[key] = tuple(self._walk(split))
            return _INDEX[key]

    def _walk(self, split: str) -> Iterator[str]:
        top = self.folder / split
        for name in sorted(os.listdir(top)) if top.is_dir() else ():
            found = _NAME.fullmatch(name)
            # ALFWorld's own loader skips these as well: objects inside objects, and sliced objects.
            if found is None or found["type"] not in self.task_types or "Sliced" in name:
                continue
            for trial in sorted((top / name).iterdir()):
                path = trial / "game.tw-pddl"
                if path.is_file() and re.search(rb'"solvable"\s*:\s*true', path.read_bytes()):
                    yield f"{split}/{name}/{trial.name}"

    def _path(self, task: str) -> Path:
        path = self.folder / task / "game.tw-pddl"
        if task.count("/") != 2 or ".." in task or not path.is_file():
            raise ConfigError(f"task {task!r} does not exist: there is no file {path}")
        return path

    def load(self, task: str) -> LoadedGame:
        """Load the game of a task, sharing it among the environments of this process."""
        path = self._path(task)
        return _shared((str(path.resolve()), path.stat().st_mtime_ns), lambda: self._read(path))

    def _read(self, path: Path) -> LoadedGame:
        try:
            file = json.loads(path.read_bytes())
        except ValueError as error:
            raise GameFileError(f"{path}: not JSON: {error}") from error
        if not isinstance(file, dict):
            raise GameFileError(f"{path}: wanted a JSON object, found {type(file).__name__}")
        name = _NAME.fullmatch(path.parent.parent.name)
        if name is None:
            raise GameFileError(f"{path}: the folder is not named TASK-OBJECT-INSIDE-PLACE-SCENE")
        return _loaded(_game(file, str(path)), Wanted(name["type"], name["object"], name["place"]), file)

    def hash(self, task: str) -> str:
        """Hash the game file."""
        return hashlib.sha256(self._path(task).read_bytes()).hexdigest()

    def other(self, task: str) -> None:
        """Return None: only generated rooms have another goal."""


_INDEX: dict[tuple[str, str, tuple[str, ...]], tuple[str, ...]] = {}
_INDEX_LOCK = threading.Lock()
_LOADED: OrderedDict[Any, LoadedGame] = OrderedDict()
_LOADED_LOCK = threading.Lock()
_CACHED_GAMES = 64  # about 0.3 MB each


def _shared(key: Any, load: Callable[[], LoadedGame]) -> LoadedGame:
    """Load a game, or return it from the process-wide cache of the most recently used ones."""
    with _LOADED_LOCK:
        if key in _LOADED:
            _LOADED.move_to_end(key)
            return _LOADED[key]
        _LOADED[key] = load()
        while len(_LOADED) > _CACHED_GAMES:
            _LOADED.popitem(last=False)
        return _LOADED[key]


def write_games(folder: str | Path, made: Iterable[GeneratedGame]) -> list[Path]:
    """Write games in ALFWorld's layout, for its own tools and for `data=FOLDER`; return their folders."""
    written = []
    for game in made:
        split, _, index = game.task.partition("/")
        toggle = game.receptacle if game.task_type == "look_at_obj_in_light" else ""
        name = f"{game.task_type}-{game.goal.object}-None-{game.receptacle}-{game.scene}"
        trial = Path(folder) / split / name / f"trial_agentrl_{index}"
        trial.mkdir(parents=True, exist_ok=True)
        facts = {
            "task_id": trial.name,
            "task_type": game.task_type,
            "pddl_params": {
                "object_target": game.goal.object,
                "parent_target": "" if toggle else game.receptacle,
                "toggle_target": toggle,
                "mrecep_target": "",
                "object_sliced": False,
            },
            "scene": {"floor_plan": f"FloorPlan{game.scene}", "scene_num": game.scene},
            "turk_annotations": {"anns": [{"task_desc": game.goal.sentence}]},
        }
        (trial / "game.tw-pddl").write_text(json.dumps(game_file(game)))
        (trial / "traj_data.json").write_text(json.dumps(facts, indent=1))
        (trial / "initial_state.pddl").write_text(game.problem)
        written.append(trial)
    return written
