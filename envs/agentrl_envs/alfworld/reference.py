"""TextWorld's PDDL engine behind our engine's interface, for comparison; slow, and one per process."""

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
from agentrl_envs.alfworld.package_data import INSTALL_COMMAND

_in_use = threading.Lock()


class ReferenceEngine:
    """TextWorld's engine for a `game.tw-pddl`, with object names from ALFWorld's own `Demangler`.

    The library keeps global parser and solver state and is not thread-safe, so only one engine per process
    may be open, and it cannot return to an earlier state.
    """

    def __init__(self) -> None:
        # ALFWorld creates a folder in the home directory unless this variable is set.
        os.environ.setdefault("ALFWORLD_DATA", tempfile.gettempdir())
        try:
            import_module("fast_downward")  # TextWorld reports a missing one only later
            from alfworld.agents.utils.misc import Demangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            lack = (
                f"engine 'textworld' is not installed ({error}): {INSTALL_COMMAND}; "
                "then (builds C++ for minutes)"
            )
            raise missing_extra(lack, "alfworld-reference") from error
        if not _in_use.acquire(blocking=False):
            raise ConfigError(
                "engine: 'textworld' supports one environment per process; close the other one first"
            )
        self._open = True
        self._demangler = Demangler
        self._env = PddlEnv(EnvInfos(admissible_commands=True, won=True, moves=True, score=True, lost=True))

    def close(self) -> None:
        """Allow another engine to be opened in this process."""
        if self._open:
            self._open = False
            _in_use.release()

    def begin(self, file: Mapping[str, Any]) -> GameState:
        """Load the content of a `game.tw-pddl` and return its first state."""
        self._env.load(dict(file))
        infos = self._env._entity_infos
        demangler = self._demangler(game_infos=infos)
        for info in infos.values():
            info.name = demangler.demangle_alfred_name(info.id)
        return self.reset()

    def reset(self) -> GameState:
        """Restart the loaded game and return its first state."""
        return _game_state(self._env.reset())

    def step(self, command: str) -> tuple[GameState, int, bool]:
        """Run a command; return the next state, the score and whether the engine reports the game done."""
        state, score, done = self._env.step(command)
        return _game_state(state), score, done

    def start(self, loaded: LoadedGame) -> GameState:
        """Load a game and return its first state."""
        return self.begin(loaded.file)

    def advance(self, loaded: LoadedGame, state: GameState, command: str) -> GameState:
        """Run a command in the current state and return the next one."""
        return self.step(command)[0]

    def other_reached(self, loaded: LoadedGame, state: GameState) -> bool:
        """Return False: TextWorld supports one goal per game."""
        return False


def _game_state(state: Any) -> GameState:
    shown = json.dumps([state.feedback, state["admissible_commands"]])
    key = int.from_bytes(hashlib.blake2b(shown.encode(), digest_size=7).digest(), "big")
    commands = tuple(state["admissible_commands"])
    return GameState(state.feedback, commands, bool(state["won"]), state["moves"], key, (), {}, ())
