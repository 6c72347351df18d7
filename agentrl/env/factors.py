"""Compute factors of turns: numbers from the texts of a turn, by functions in a table by environment.

A method such as `lare` learns which of them are worth a reward. Every environment has those of `COMMON`; the
plug-in that registers an environment may add some of its own by `register_factors`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agentrl.env.registry import load_plugins
from agentrl.errors import ConfigError


@dataclass(frozen=True)
class PlayedTurn:
    """Texts of a turn and of the turns before it.

    Args:
        opening: The first observation of the episode.
        earlier: The observation and the action of each turn before this one, oldest first.
        observation: The observation that the turn saw.
        action: Its action.
        answer: The observation that followed; empty if none did.
        valid: Whether the action was understood.
        choices: How many actions the environment offered; None if it does not list them, or nobody counted.
        choices_after: How many it offered after the action.
    """

    opening: str
    earlier: tuple[tuple[str, str], ...]
    observation: str
    action: str
    answer: str
    valid: bool = True
    choices: int | None = None
    choices_after: int | None = None

    @property
    def seen(self) -> tuple[str, ...]:
        """Return the observations up to this turn, oldest first."""
        return (*(observation for observation, _ in self.earlier), self.observation)


Factor = Callable[[PlayedTurn], float]


@lru_cache(maxsize=8192)  # the observations of an episode are read again at each of its later turns
def words(text: str) -> frozenset[str]:
    """Return the words and numbers of a text, in lower case.

    >>> sorted(words("Take mug 1!"))
    ['1', 'mug', 'take']
    """
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def share_of(wanted: frozenset[str], text: str) -> float:
    """Return the share of the wanted words that a text has; 0 if none are wanted."""
    return len(wanted & words(text)) / len(wanted) if wanted else 0.0


def new_words(turn: PlayedTurn) -> float:
    """Return the share of the words of the answer that no observation had before."""
    told, known = words(turn.answer), frozenset[str]().union(*map(words, turn.seen))
    return len(told - known) / len(told) if told else 0.0


def seen_answer(turn: PlayedTurn) -> float:
    """Return 1 if the answer is an observation of before."""
    return float(turn.answer in turn.seen)


def repeated_action(turn: PlayedTurn) -> float:
    """Return 1 if the action was taken before in the same observation."""
    return float((turn.observation, turn.action) in turn.earlier)


def not_understood(turn: PlayedTurn) -> float:
    """Return 1 if the action was not understood."""
    return float(not turn.valid)


def more_choices(turn: PlayedTurn) -> float:
    """Return by which share of them the offered actions became more; below 0 if they became fewer."""
    before, after = turn.choices or 0, turn.choices_after or 0
    return (after - before) / max(before, after) if before and after else 0.0


COMMON: Mapping[str, Factor] = {
    "new_words": new_words,
    "seen_answer": seen_answer,
    "repeated_action": repeated_action,
    "not_understood": not_understood,
    "more_choices": more_choices,
}
_tables: dict[str, dict[str, Factor]] = {}


def register_factors(env_id: str, factors: Mapping[str, Factor]) -> None:
    """Add factors to the table of an environment; a name that it has already is replaced.

    Args:
        env_id: The id of the environment.
        factors: The functions by name. They must be pure, and their values finite, best between -1 and 1.

    Raises:
        ConfigError: If a name is one of `COMMON`.
    """
    if taken := sorted(factors.keys() & COMMON.keys()):
        raise ConfigError(
            f"factors of {env_id!r}: every environment has {', '.join(taken)}, wanted other names"
        )
    _tables.setdefault(env_id, {}).update(factors)


def factors_of(env_id: str) -> dict[str, Factor]:
    """Return the factors of an environment by name: the common ones, then its own by name."""
    load_plugins()
    return dict(COMMON) | dict(sorted(_tables.get(env_id, {}).items()))


def factor_values(factors: Mapping[str, Factor], turn: PlayedTurn) -> list[float]:
    """Return the value of each factor.

    Raises:
        ConfigError: If a factor fails, or its value is not a finite number; names it.
    """
    found = []
    for name, factor in factors.items():
        try:
            value = float(factor(turn))
        except Exception as error:
            raise ConfigError(f"factor {name!r} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ConfigError(f"factor {name!r} is {value}, wanted a finite number")
        found.append(value)
    return found
