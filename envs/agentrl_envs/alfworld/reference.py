"""TextWorld's PDDL engine behind the interface of ours, to compare the two; slow, and one per process."""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from agentrl.errors import ConfigError, missing_extra
from agentrl_envs.alfworld.engine import GameState
from agentrl_envs.alfworld.games import LoadedGame
from agentrl_envs.alfworld.package_data import REMEDY

_in_use = threading.Lock()


class ReferenceEngine:
    """Plays a `game.tw-pddl` with TextWorld, named by ALFWorld's own `Demangler`.

    The library keeps global parsers and solver state: threads break it, so there is one engine per process,
    and a state cannot be gone back to.
    """

    def __init__(self) -> None:
        # ALFWorld makes a folder in the home directory unless it is told another place.
        os.environ.setdefault("ALFWORLD_DATA", tempfile.gettempdir())
        try:
            import_module("fast_downward")  # TextWorld itself notices only later that it is missing
            from alfworld.agents.utils.misc import Demangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            lack = f"engine 'textworld' is not installed ({error}): {REMEDY}; and, building C++ for minutes"
            raise missing_extra(lack, "alfworld-reference") from error
        if not _in_use.acquire(blocking=False):
            raise ConfigError(
                "engine: 'textworld' serves one environment per process; close the other one first"
            )
        self._open = True
        self._demangler = Demangler
        self._env = PddlEnv(EnvInfos(admissible_commands=True, won=True, moves=True, score=True, lost=True))

    def close(self) -> None:
        """Let another engine of this process begin."""
        if self._open:
            self._open = False
            _in_use.release()

    def begin(self, file: Mapping[str, Any]) -> GameState:
        """Load the content of a `game.tw-pddl` and begin it."""
        self._env.load(dict(file))
        infos = self._env._entity_infos
        demangler = self._demangler(game_infos=infos)
        for info in infos.values():
            info.name = demangler.demangle_alfred_name(info.id)
        return self.reset()

    def reset(self) -> GameState:
        """Begin the loaded game anew."""
        return _game_state(self._env.reset())

    def step(self, command: str) -> tuple[GameState, int, bool]:
        """Return the next moment, the score and whether the engine calls the game done."""
        state, score, done = self._env.step(command)
        return _game_state(state), score, done

    def start(self, loaded: LoadedGame) -> GameState:
        return self.begin(loaded.file)

    def advance(self, loaded: LoadedGame, state: GameState, command: str) -> GameState:
        return self.step(command)[0]

    def other_reached(self, loaded: LoadedGame, state: GameState) -> bool:
        """Say no: TextWorld knows one goal per game."""
        return False


def _game_state(state: Any) -> GameState:
    shown = json.dumps([state.feedback, state["admissible_commands"]])
    key = int.from_bytes(hashlib.blake2b(shown.encode(), digest_size=7).digest(), "big")
    commands = tuple(state["admissible_commands"])
    return GameState(state.feedback, commands, bool(state["won"]), state["moves"], key, (), {}, ())
