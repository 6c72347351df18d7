"""`agentrl/ALFWorld-v0`: household tasks in text, with ALFWorld's rules and wording.

Games are generated, unless `data` names a folder of official ones; a score on generated games (`env.data` is
"generated") is not a score of the ALFWorld benchmark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.env import TextSpace, unknown
from agentrl.env.numbers import MAX_STEPS, whole_number
from agentrl.errors import ConfigError
from agentrl_envs.alfworld.engine import GameState
from agentrl_envs.alfworld.expert import SearchingExpert
from agentrl_envs.alfworld.games import Games, GeneratedGames, LoadedGame, OfficialGames
from agentrl_envs.alfworld.generate import SPLITS, TASK_TYPES, Options
from agentrl_envs.alfworld.wording import compact, compact_opening, compact_task, reworded, task_text

OPTIONAL_COMMANDS = ("look", "inventory", "examine", "slice", "help")


class Engine(Protocol):
    """Interface of a game engine: the native one or TextWorld's."""

    def start(self, loaded: LoadedGame) -> GameState:
        """Return the first state of a game."""
        ...

    def advance(self, loaded: LoadedGame, state: GameState, command: str) -> GameState:
        """Return the state after a command."""
        ...

    def other_reached(self, loaded: LoadedGame, state: GameState) -> bool:
        """Return whether the game's other goal holds in a state."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...


class EpisodeState(NamedTuple):
    """State of an episode; immutable, so taking and restoring a snapshot costs nothing."""

    task: str
    loaded: LoadedGame
    state: GameState
    observation: str
    steps: int
    finished: bool
    other_success: bool
    history: tuple[tuple[str, str], ...]


class ALFWorldEnv(gymnasium.Env[str, str]):
    """Household tasks: find an object, clean, heat or cool it if asked to, and put it in its target place.

    The episode terminates with reward 1 when the goal is first reached, and is truncated after `max_steps`
    commands.

    Args:
        split: The split from which `reset` draws a task when it is given none.
        max_steps: The number of commands per episode.
        task_types: One name or several, None for all six. They alternate over the task ids.
        max_receptacles: None for full rooms; otherwise one receptacle per type, and at most this many.
        object_types: None for full rooms; otherwise the number of object types in the room.
        text: "raw" for ALFWorld's wording, "compact" for a short one.
        menu: "full" lists every admissible command in `info["actions"]`; "task" leaves out look, inventory,
            examine, slice and help, which no task needs.
        engine: "native", or "textworld" (extra `alfworld-reference`; slow, one environment per process).
        expert: Whether to add `info["expert"]`, the next command of an expert that has to search, too.
        paraphrase: Whether to add `info["paraphrase"]`, the observation in other words or another order.
        data: The folder of official games (such as `json_2.1.1`) to use instead of generated ones.

    `info` holds success, actions, score (0 or 1), valid, task_type, state_key, other_success (whether the
    goal of `other_goal(task)` has been reached so far; always False with TextWorld), task_text at the reset,
    and expert and paraphrase on request.
    """

    splits = tuple(SPLITS)
    determinism = "episode"
    instructions: ClassVar[str] = (
        "You are in a house and act on it by short commands. Go to a piece of furniture to see what is "
        "there, and open it if it is closed. You can carry one object at a time. If the task asks for it, "
        "clean the object in a sink, heat it in a microwave, cool it in a fridge or look at it under a lamp, "
        "and put it where it belongs. Commands read like: go to desk 1 | open drawer 2 | take mug 1 from "
        "shelf 3 | clean mug 1 with sinkbasin 1 | move mug 1 to desk 1 | use desklamp 1."
    )

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
        paraphrase: bool = False,
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
            raise ConfigError("data: max_receptacles and object_types apply only to generated games")
        self._games: Games = (
            GeneratedGames(options) if data is None else OfficialGames(data, options.task_types)
        )
        self.data = self._games.label
        self.split = split
        self.max_steps = max_steps
        self._compact = text == "compact"
        self._short_menu = menu == "task"
        self._with_expert, self._with_paraphrase = expert, paraphrase
        self._engine = _engine(engine)
        if engine == "textworld":  # TextWorld cannot return to an earlier state
            vars(self).update(snapshot=None, restore=None)
        self._episode: EpisodeState | None = None
        self._expert: tuple[SearchingExpert, LoadedGame, tuple[tuple[str, str], ...]] | None = None
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    def tasks(self, split: str) -> Sequence[str]:
        """Return the task ids of a split, such as "train/0"."""
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return self._games.tasks(split)

    def task_hash(self, task: str) -> str:
        """Hash the game's rules, room, goal and wording."""
        return self._games.hash(task)

    def other_goal(self, task: str) -> str | None:
        """Return the id of the task in the same room that asks for another object, None if there is none.

        `other_goal("valid_unseen/17")` is "valid_unseen/17#other", and vice versa. In both tasks
        `info["other_success"]` says whether the goal that was *not* stated has been reached so far.
        """
        return self._games.other(task)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or a random one of the split; return its observation and info."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            tasks = self.tasks(self.split)
            if not tasks:
                raise ConfigError(f"split: {self.split!r} has no games of the wanted task types")
            task = tasks[int(self.np_random.integers(len(tasks)))]
        elif not isinstance(task, str):
            raise ConfigError(f"options: task is {task!r}, wanted a task id such as 'train/0'")
        loaded = self._games.load(task)
        state = self._engine.start(loaded)
        self._expert = None
        text = compact_opening(state.observation, loaded.wanted) if self._compact else state.observation
        self._episode = EpisodeState(
            task, loaded, state, text, 0, False, self._engine.other_reached(loaded, state), ()
        )
        named = self._named(loaded, state)
        return text, self._info(self._episode, True) | {"task_text": named}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run a command; return observation, reward, terminated, truncated and info."""
        before = self._episode
        if before is None or before.finished:
            raise ResetNeeded("the episode is over or has not begun: call reset first")
        state = self._engine.advance(before.loaded, before.state, action)
        steps = before.steps + 1
        truncated = steps >= self.max_steps and not state.won
        text = compact(state.observation) if self._compact else state.observation
        episode = EpisodeState(
            before.task,
            before.loaded,
            state,
            text,
            steps,
            state.won or truncated,
            before.other_success or self._engine.other_reached(before.loaded, state),
            (*before.history, (action.strip(), state.observation)),
        )
        self._episode = episode
        info = self._info(episode, state.moves > before.state.moves)
        return text, float(state.won), state.won, truncated, info

    def _info(self, episode: EpisodeState, valid: bool) -> dict[str, Any]:
        state = episode.state
        info: dict[str, Any] = {
            "success": state.won,
            "score": float(state.won),
            "actions": self._menu(state),
            "valid": valid,
            "task_type": episode.loaded.wanted.task_type,
            "state_key": state.key,
            "other_success": episode.other_success,
        }
        if self._with_expert:
            info["expert"] = self.expert()
        if self._with_paraphrase:
            opens = episode.steps == 0
            info["paraphrase"] = reworded(
                episode.observation, self._named(episode.loaded, state) if opens else None
            )
        return info

    def _named(self, loaded: LoadedGame, start: GameState) -> str | None:
        """Return the text of a task, given the first state of its game."""
        opening = start.observation
        return compact_task(opening, loaded.wanted) if self._compact else task_text(opening)

    def _menu(self, state: GameState) -> list[str]:
        if not self._short_menu:
            return list(state.admissible)
        return [command for command in state.admissible if not command.startswith(OPTIONAL_COMMANDS)]

    def expert(self) -> str | None:
        """Return the expert's next command, based on this episode's observations; None after its end."""
        episode = self._episode
        if episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        if episode.finished:
            return None
        return self._expert_for(episode).next(self._menu(episode.state))

    def _expert_for(self, episode: EpisodeState) -> SearchingExpert:
        expert, loaded, read = self._expert or (None, None, ())
        if expert is None or loaded is not episode.loaded or episode.history[: len(read)] != read:
            opening = episode.loaded.game.start.observation
            expert, read = SearchingExpert(episode.loaded.wanted, opening, episode.loaded.holds), ()
        for command, text in episode.history[len(read) :]:
            expert.observe(command, text)
        self._expert = expert, episode.loaded, episode.history
        return expert

    @property
    def walkthrough(self) -> tuple[str, ...]:
        """Return commands that solve the current task from its start, given full knowledge of the room."""
        if self._episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._episode.loaded.game.walkthrough

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def snapshot(self) -> EpisodeState:
        """Return the current state of the episode."""
        if self._episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._episode

    def restore(self, snapshot: EpisodeState) -> tuple[str, dict[str, Any]]:
        """Return to a snapshot; return its observation and info."""
        self._episode = snapshot
        return snapshot.observation, self._info(snapshot, True)


class NativeEngine:
    """Native engine; stateless, because every `GameState` is a complete value."""

    def start(self, loaded: LoadedGame) -> GameState:
        """Return the first state of a game."""
        return loaded.game.start

    def advance(self, loaded: LoadedGame, state: GameState, command: str) -> GameState:
        """Return the state after a command."""
        return loaded.game.advance(state, command)

    def other_reached(self, loaded: LoadedGame, state: GameState) -> bool:
        """Return whether the game's other goal holds in a state."""
        return loaded.game.other_reached(state)

    def close(self) -> None:
        """Do nothing: the engine holds no resources."""


def _engine(name: str) -> Engine:
    if name == "native":
        return NativeEngine()
    from agentrl_envs.alfworld.reference import ReferenceEngine

    return ReferenceEngine()
