"""Validate what `reset` and `step` return, on every call of an episode, and convert it to plain values.

`reset_answer` and `step_answer` return plain Python values or raise the first fault. Each `*_fault` function
returns what is wrong with one part, or None.
"""

from collections.abc import Callable, Mapping
from typing import Any

from agentrl.errors import EnvironmentContractError
from agentrl.values import (
    ValueFaultError,
    as_flag,
    as_json,
    as_key,
    as_number,
    as_text,
    as_text_list,
    describe_value,
)

RESET_PARTS = ("observation", "info")
STEP_PARTS = ("observation", "reward", "terminated", "truncated", "info")
MAX_NAME_CHARS = 1_000  # of a name that scores are grouped by

_Rule = Callable[[object], Any]


def _or_none(rule: _Rule) -> _Rule:
    """Extend a rule to accept None, which means "unknown", like a missing key."""
    return lambda value: None if value is None else rule(value)


# The conversion of each key of `info` that has a meaning. All other keys are passed to policies unchanged,
# and are neither checked nor stored.
RULES: Mapping[str, _Rule] = {
    "success": as_flag,
    "actions": _or_none(as_text_list),
    "score": _or_none(as_number),
    "task_text": _or_none(as_text),
    "task_type": _or_none(lambda value: as_text(value, MAX_NAME_CHARS)),
    "expert": _or_none(as_text),
    "paraphrase": _or_none(as_text),
    "state_key": _or_none(as_key),
    "valid": as_flag,
    "other_success": as_flag,
    "tool": as_json,
    "tool_error": as_json,
}


def reset_answer(answer: object) -> tuple[str, Mapping[str, Any]]:
    """Validate the return value of `reset` and return (observation, info) as plain values.

    Raises:
        EnvironmentContractError: A part is invalid.
    """
    observation, info = _parts("reset", answer, RESET_PARTS)
    try:
        return _plain_observation(observation), plain_info(info)
    except ValueFaultError as fault:
        raise EnvironmentContractError(f"reset: {fault}") from fault


def step_answer(answer: object) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
    """Validate the return value of `step` and return its five parts as plain values.

    Raises:
        EnvironmentContractError: A part is invalid.
    """
    observation, reward, terminated, truncated, info = _parts("step", answer, STEP_PARTS)
    try:
        return (
            _plain_observation(observation),
            _named("the reward", as_number, reward),
            _named("terminated", as_flag, terminated),
            _named("truncated", as_flag, truncated),
            plain_info(info),
        )
    except ValueFaultError as fault:
        raise EnvironmentContractError(f"step: {fault}") from fault


def plain_info(info: object) -> dict[str, Any]:
    """Return an info dictionary whose known keys hold plain values.

    Raises:
        ValueFaultError: A value is invalid; the message names the key, the value and what is wanted.
    """
    if not isinstance(info, Mapping):
        raise ValueFaultError(f"info is {describe_value(info)}, wanted a mapping")
    plain: dict[str, Any] = {}
    for key, value in info.items():
        if not isinstance(key, str):
            raise ValueFaultError(f"info has the key {describe_value(key)}, wanted only str")
        plain[key] = _named(f"info[{key!r}]", RULES[key], value) if key in RULES else value
    if "success" not in plain:
        raise ValueFaultError("info['success'] is missing, wanted a bool: is the task solved so far?")
    return plain


def _plain_observation(observation: object) -> str:
    return _named("the observation", lambda value: as_text(value, None), observation)  # type: ignore[no-any-return]


def _named(what: str, rule: _Rule, value: object) -> Any:
    try:
        return rule(value)
    except ValueFaultError as fault:
        raise ValueFaultError(f"{what} {fault}") from fault


def _parts(call: str, answer: Any, parts: tuple[str, ...]) -> tuple[Any, ...]:
    fault = shape_fault(answer, parts)
    if fault is not None:
        raise EnvironmentContractError(f"{call}: {fault}")
    return tuple(answer)


def shape_fault(answer: object, parts: tuple[str, ...]) -> str | None:
    """Check that an answer is a tuple with one entry for each of `parts`."""
    if isinstance(answer, tuple) and len(answer) == len(parts):
        return None
    found = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else f"{describe_value(answer)}"
    return f"returned {found}, wanted the tuple ({', '.join(parts)})"


def observation_fault(observation: object) -> str | None:
    """Check that an observation is a str that can be encoded as UTF-8."""
    return _fault(_plain_observation, observation)


def reward_fault(reward: object) -> str | None:
    """Check that a reward is a real number that fits into a finite float."""
    return _fault(lambda value: _named("the reward", as_number, value), reward)


def flag_fault(name: str, flag: object) -> str | None:
    """Check that a flag is a Python or NumPy bool."""
    return _fault(lambda value: _named(name, as_flag, value), flag)


def success_fault(info: Mapping[str, Any]) -> str | None:
    """Check that `success` is present and a bool."""
    return _fault(plain_info, {key: info[key] for key in ("success",) if key in info})


def optional_fault(info: Mapping[str, Any]) -> str | None:
    """Check the values of the optional keys that are present."""
    return _fault(plain_info, {**info, "success": False})


def _fault(rule: _Rule, value: object) -> str | None:
    try:
        rule(value)
    except ValueFaultError as fault:
        return str(fault)
    return None
