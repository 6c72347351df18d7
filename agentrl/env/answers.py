"""What `reset` and `step` may answer, checked on every call while episodes are played.

Each `*_fault` says what is wrong with one part, or returns None; `reset_answer` and `step_answer` raise the
first fault.
"""

from collections.abc import Mapping
from math import isfinite
from numbers import Real
from typing import Any

from agentrl.errors import EnvironmentContractError

RESET_PARTS = ("observation", "info")
STEP_PARTS = ("observation", "reward", "terminated", "truncated", "info")

# What an optional key of `info` may hold; None means "unknown here", which an absent key says as well.
_OPTIONAL: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("score", (Real, type(None))),
    ("task_type", (str, type(None))),
    ("expert", (str, type(None))),
    ("state_key", (str, int, type(None))),
    ("valid", (bool,)),
    ("other_success", (bool,)),
)


def reset_answer(answer: object) -> tuple[str, Mapping[str, Any]]:
    """Return `(observation, info)` of a `reset`, or raise `EnvironmentContractError`."""
    observation, info = _parts("reset", answer, RESET_PARTS)
    fault = observation_fault(observation) or info_fault(info)
    if fault is not None:
        raise EnvironmentContractError(f"reset: {fault}")
    return observation, info


def step_answer(answer: object) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
    """Return the five parts of a `step`, the reward as a float, or raise `EnvironmentContractError`."""
    observation, reward, terminated, truncated, info = _parts("step", answer, STEP_PARTS)
    fault = (
        observation_fault(observation)
        or reward_fault(reward)
        or flag_fault("terminated", terminated)
        or flag_fault("truncated", truncated)
        or info_fault(info)
    )
    if fault is not None:
        raise EnvironmentContractError(f"step: {fault}")
    return observation, float(reward), terminated, truncated, info


def _parts(call: str, answer: Any, parts: tuple[str, ...]) -> tuple[Any, ...]:
    fault = shape_fault(answer, parts)
    if fault is not None:
        raise EnvironmentContractError(f"{call}: {fault}")
    return tuple(answer)


def shape_fault(answer: object, parts: tuple[str, ...]) -> str | None:
    """A tuple with one entry for each of `parts`."""
    if isinstance(answer, tuple) and len(answer) == len(parts):
        return None
    found = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else f"{shown(answer)}"
    return f"returned {found}, wanted the tuple ({', '.join(parts)})"


def observation_fault(observation: object) -> str | None:
    """A str that can be written as UTF-8."""
    if not isinstance(observation, str):
        return f"the observation is {shown(observation)}, wanted a str"
    if not observation.isascii():
        try:
            observation.encode()
        except UnicodeEncodeError as error:
            return f"the observation holds a lone surrogate at character {error.start}, which is no text"
    return None


def reward_fault(reward: object) -> str | None:
    """A real number, neither infinite nor nan."""
    if not isinstance(reward, Real) or not isfinite(reward):
        return f"the reward is {shown(reward)}, wanted a finite real number"
    return None


def flag_fault(name: str, flag: object) -> str | None:
    """A bool; numpy's is not one."""
    return None if isinstance(flag, bool) else f"{name} is {shown(flag)}, wanted a bool"


def info_fault(info: object) -> str | None:
    """A mapping with a bool `success`, whose other known keys hold what they should."""
    if not isinstance(info, Mapping):
        return f"info is {shown(info)}, wanted a mapping"
    return success_fault(info) or optional_fault(info)


def success_fault(info: Mapping[str, Any]) -> str | None:
    """`success` is there and a bool."""
    if "success" not in info:
        return "info['success'] is missing, wanted a bool: is the task solved so far?"
    if not isinstance(info["success"], bool):
        return f"info['success'] is {shown(info['success'])}, wanted a bool"
    return None


def optional_fault(info: Mapping[str, Any]) -> str | None:
    """The optional keys that are there hold what they should."""
    actions = info.get("actions")
    if actions is not None:
        if not isinstance(actions, list | tuple):
            return f"info['actions'] is {shown(actions)}, wanted a list of str"
        for action in actions:
            if not isinstance(action, str):
                return f"info['actions'] holds {shown(action)}, wanted only str"
    for key, kinds in _OPTIONAL:
        if key in info and not isinstance(info[key], kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            return f"info[{key!r}] is {shown(info[key])}, wanted {wanted}"
    return None


def shown(value: object) -> str:
    """Describe a value for a message: its repr, cut, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:80] + '…'} ({type(value).__name__})"
