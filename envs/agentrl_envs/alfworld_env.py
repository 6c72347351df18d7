"""`agentrl/ALFWorld-v0`: household tasks in text, with ALFWorld's rules and wording.

Games are generated, unless `data` names a folder of official ones; a score on generated games (`env.data` is
"generated") is not a score of the ALFWorld benchmark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.env import TextSpace, unknown
from agentrl.env.numbers import MAX_STEPS, whole_number
from agentrl.errors import ConfigError
from agentrl_envs.alfworld.engine import Snapshot
from agentrl_envs.alfworld.expert import SearchingExpert
from agentrl_envs.alfworld.games import Games, GeneratedGames, LoadedGame, OfficialGames
from agentrl_envs.alfworld.generate import SPLITS, TASK_TYPES, Options
from agentrl_envs.alfworld.wording import compact, compact_opening

LEFT_OUT = ("look", "inventory", "examine", "slice", "help")


class Engine(Protocol):
    """What plays a game: the native engine, or TextWorld's."""

    def start(self, loaded: LoadedGame) -> Snapshot: ...

    def advance(self, loaded: LoadedGame, moment: Snapshot, command: str) -> Snapshot: ...

    def other_reached(self, loaded: LoadedGame, moment: Snapshot) -> bool: ...

    def close(self) -> None: ...


class Saved(NamedTuple):
    """A point of an episode to come back to; immutable, made and restored in no time."""

    task: str
    loaded: LoadedGame
    moment: Snapshot
    observation: str
    steps: int
    finished: bool
    other_success: bool
    history: tuple[tuple[str, str], ...]


class ALFWorldEnv(gymnasium.Env[str, str]):
    """Find an object in a room, treat it if told so, and bring it where it shall go.

    The episode ends when the goal is first reached (reward 1), or is cut off after `max_steps` commands.

    Args:
        split: the tasks to draw from when `reset` is not told one.
        max_steps: commands per episode.
        task_types: names or one name, None for all six. They take turns over the task ids.
        max_receptacles: None for whole rooms; else one receptacle per type and at most so many.
        object_types: None for whole rooms; else how many types of objects lie about.
        text: "raw" is ALFWorld's wording, "compact" a short one.
        menu: "full" lists every admissible command in `info["actions"]`, "task" leaves out look, inventory,
            examine, slice and help, which no task needs.
        engine: "native", or "textworld" (extra `alfworld-reference`, one at a time per process, slow).
        expert: give `info["expert"]`, the next command of an expert that has to search as well.
        data: folder of official games (`json_2.1.1` or alike) instead of generated ones.

    `info` holds success, actions, score (0 or 1), valid, task_type, state_key, other_success (whether the
    goal of `other_goal(task)` has been reached so far; never with TextWorld), and expert when asked for.
    """

    splits = tuple(SPLITS)
    determinism = "episode"

    def __init__(
        self,
        split: str = "train",
        max_steps: int = 50,
        task_types: str | Sequence[str] | None = None,
        max_receptacles: int | None = None,
        object_types: int | None = None,
        text: str = "raw",
        menu: str = "full",
        engine: str = "native",
        expert: bool = False,
        data: str | Path | None = None,
    ) -> None:
        for name, value, choices in (
            ("split", split, self.splits),
            ("text", text, ("raw", "compact")),
            ("menu", menu, ("full", "task")),
            ("engine", engine, ("native", "textworld")),
        ):
            if value not in choices:
                raise unknown(name, value, choices)
        whole_number("max_steps", max_steps, 1, MAX_STEPS)
        if isinstance(task_types, str):
            task_types = (task_types,)
        options = Options(
            TASK_TYPES if task_types is None else tuple(task_types), max_receptacles, object_types
        )
        if data is not None and (max_receptacles is not None or object_types is not None):
            raise ConfigError("data: max_receptacles and object_types shape only generated games")
        self._games: Games = (
            GeneratedGames(options) if data is None else OfficialGames(data, options.task_types)
        )
        self.data = self._games.label
        self.split = split
        self.max_steps = max_steps
        self._compact = text == "compact"
        self._short_menu = menu == "task"
        self._with_expert = expert
        self._engine = _engine(engine)
        if engine == "textworld":  # it cannot go back, so it does not claim to
            vars(self).update(snapshot=None, restore=None)
        self._saved: Saved | None = None
        self._expert: tuple[SearchingExpert, LoadedGame, tuple[tuple[str, str], ...]] | None = None
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    def tasks(self, split: str) -> Sequence[str]:
        """List the ids of a split, such as "train/0"."""
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return self._games.tasks(split)

    def task_hash(self, task: str) -> str:
        """Hash the game's rules, room, goal and wording."""
        return self._games.hash(task)

    def other_goal(self, task: str) -> str | None:
        """Name the task in the same room that asks for another object, if this room has such a goal.

        `other_goal("valid_unseen/17")` is "valid_unseen/17#other", and the other way round. In either,
        `info["other_success"]` says whether the goal that the player was *not* told has been reached so far.
        """
        return self._games.other(task)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            tasks = self.tasks(self.split)
            if not tasks:
                raise ConfigError(f"split: {self.split!r} has no games of the wanted task types")
            task = tasks[int(self.np_random.integers(len(tasks)))]
        elif not isinstance(task, str):
            raise ConfigError(f"options: task is {task!r}, wanted a task id")
        loaded = self._games.load(task)
        moment = self._engine.start(loaded)
        self._expert = None
        text = compact_opening(moment.observation, loaded.wanted) if self._compact else moment.observation
        self._saved = Saved(
            task, loaded, moment, text, 0, False, self._engine.other_reached(loaded, moment), ()
        )
        return text, self._info(self._saved, True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        before = self._saved
        if before is None or before.finished:
            raise ResetNeeded("the episode is over or has not begun: call reset first")
        moment = self._engine.advance(before.loaded, before.moment, action)
        steps = before.steps + 1
        truncated = steps >= self.max_steps and not moment.won
        text = compact(moment.observation) if self._compact else moment.observation
        saved = Saved(
            before.task,
            before.loaded,
            moment,
            text,
            steps,
            moment.won or truncated,
            before.other_success or self._engine.other_reached(before.loaded, moment),
            (*before.history, (action.strip(), moment.observation)),
        )
        self._saved = saved
        info = self._info(saved, moment.moves > before.moment.moves)
        return text, float(moment.won), moment.won, truncated, info

    def _info(self, saved: Saved, valid: bool) -> dict[str, Any]:
        moment = saved.moment
        info: dict[str, Any] = {
            "success": moment.won,
            "score": float(moment.won),
            "actions": self._menu(moment),
            "valid": valid,
            "task_type": saved.loaded.wanted.task_type,
            "state_key": moment.key,
            "other_success": saved.other_success,
        }
        if self._with_expert:
            info["expert"] = self.expert()
        return info

    def _menu(self, moment: Snapshot) -> list[str]:
        if not self._short_menu:
            return list(moment.admissible)
        return [command for command in moment.admissible if not command.startswith(LEFT_OUT)]

    def expert(self) -> str | None:
        """Give the searching expert's next command, from what this episode has shown; None after its end."""
        saved = self._saved
        if saved is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        if saved.finished:
            return None
        return self._expert_for(saved).next(self._menu(saved.moment))

    def _expert_for(self, saved: Saved) -> SearchingExpert:
        expert, loaded, read = self._expert or (None, None, ())
        if expert is None or loaded is not saved.loaded or saved.history[: len(read)] != read:
            opening = saved.loaded.game.start.observation
            expert, read = SearchingExpert(saved.loaded.wanted, opening, saved.loaded.holds), ()
        for command, text in saved.history[len(read) :]:
            expert.observe(command, text)
        self._expert = expert, saved.loaded, saved.history
        return expert

    @property
    def walkthrough(self) -> tuple[str, ...]:
        """Commands that win the current task from its start, by someone who knows where everything is."""
        if self._saved is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._saved.loaded.game.walkthrough

    def close(self) -> None:
        self._engine.close()

    def snapshot(self) -> Saved:
        """Keep this point of the episode."""
        if self._saved is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._saved

    def restore(self, snapshot: Saved) -> tuple[str, dict[str, Any]]:
        """Go back to a kept point; return its observation and info."""
        self._saved = snapshot
        return snapshot.observation, self._info(snapshot, True)


class NativeEngine:
    """Our own engine: a moment is a value, so there is nothing to hold."""

    def start(self, loaded: LoadedGame) -> Snapshot:
        return loaded.game.start

    def advance(self, loaded: LoadedGame, moment: Snapshot, command: str) -> Snapshot:
        return loaded.game.advance(moment, command)

    def other_reached(self, loaded: LoadedGame, moment: Snapshot) -> bool:
        return loaded.game.other_reached(moment)

    def close(self) -> None:
        pass


def _engine(name: str) -> Engine:
    if name == "native":
        return NativeEngine()
    from agentrl_envs.alfworld.reference import ReferenceEngine

    return ReferenceEngine()
