"""Task ids and hashes of problems that are numbered per split: "test/3" is the fourth problem of "test"."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentrl.env.names import unknown
from agentrl.errors import ConfigError
from agentrl.values import ValueFaultError, as_json


class TaskIds(Sequence[str]):
    """Lazy sequence of the ids "split/0", "split/1", …."""

    def __init__(self, split: str, count: int) -> None:
        self._split, self._range = split, range(count)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        picked = self._range[index]
        if isinstance(picked, range):
            return [f"{self._split}/{number}" for number in picked]
        return f"{self._split}/{picked}"

    def __iter__(self) -> Iterator[str]:
        return (f"{self._split}/{number}" for number in self._range)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskIds) and (self._split, self._range) == (other._split, other._range)

    __hash__ = None  # type: ignore[assignment]


def find_problem(task: object, splits: Sequence[str], problems: Callable[[str], Sequence[Any]]) -> Any:
    """Return the problem with the given id.

    Args:
        task: The task id, "split/index".
        splits: The names of the splits.
        problems: A function that returns the problems of a split.

    Raises:
        ConfigError: There is no such task.
    """
    split, _, number = task.rpartition("/") if isinstance(task, str) else ("", "", "")
    if split in splits and number.isascii() and number.isdigit() and len(number) < 16:
        of_split = problems(split)
        if int(number) < len(of_split) and task == f"{split}/{int(number)}":
            return of_split[int(number)]
    raise unknown("task", task, (f"{name}/0" for name in splits))


def content_hash(task: str, *content: Any) -> str:
    """Return the SHA-256 of several JSON values in canonical form, as 64 hex digits.

    Raises:
        ConfigError: A value is not a JSON value; the message names the task.
    """
    return hash_json(task, content)


def hash_json(task: str, content: object) -> str:
    """Return the SHA-256 of one JSON value in canonical form; see `content_hash`."""
    try:
        text = json.dumps(
            content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_as_json
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"problem {task!r} does not consist of JSON values: {error}") from error
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _as_json(value: object) -> Any:
    try:
        return as_json(value)
    except ValueFaultError as fault:
        raise TypeError(f"a value {fault}") from fault
