"""Datasets of reasoning-gym, generated item by item and scored by their own scorers.

reasoning-gym is imported when the first dataset is opened, which takes seconds.
"""

import ast
import json
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np

from agentrl.env import unknown
from agentrl.errors import ConfigError, missing_extra
from agentrl_envs import limited_calls
from agentrl_envs.calculator import CalculatorError, parse, whole_numbers

LONGEST_ANSWER = 20_000  # characters
CACHED_ITEMS = 4_096

# In version 0.1.25 their items depend on the order of sets of strings, which differs between processes.
BY_HASH_SEED = (
    "codeio",
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)

# Their scorers evaluate the answer as Python, directly or through sympy, so answers are filtered first.
EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
WHOLE_NUMBERS = ("countdown", "puzzle24")
EXPRESSIONS = ("intermediate_integration", "polynomial_multiplication", "simple_integration")
FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "Abs"),
)

FIXED_ANSWERS = ("", "banana", "a" * 50, "0", "1", "True", "False", "Yes", "No", "[]", "None")
PROBED_ITEMS = 30
MAX_MISSES = 3  # a fixed answer that is wrong on at most this many probed items solves the dataset
OTHER_ITEMS = 3  # first items whose answers are also tried as fixed answers

_lock = threading.RLock()


class Dataset:
    """One dataset with its configuration and seed.

    Args:
        name: The name of the dataset in reasoning-gym.
        level: The level of its curriculum, from 1; None selects the dataset's default configuration.
        settings: Other fields of its configuration, as JSON.
        seed: The seed; item i depends on the seed and i alone.
        size: The number of items.
    """

    def __init__(self, name: str, level: int | None, settings: str, seed: int, size: int) -> None:
        self.key = name, level, settings, seed, size
        self.name, self.seed, self.size = name, seed, size
        factory = _factory()
        with _private_randomness(seed):
            self._data = factory.DATASETS[name][0](_config(name, level, json.loads(settings), seed, size))
        if name in EVALUATED:
            # Shadow the builtin in the scorer's module, so that it evaluates literals only.
            vars(sys.modules[type(self._data).__module__])["eval"] = ast.literal_eval
        self._items: OrderedDict[int, Mapping[str, Any]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, self.key

    def item(self, index: int) -> Mapping[str, Any]:
        """Return item `index`: question, answer, metadata.

        Raises:
            ConfigError: reasoning-gym cannot generate the item.
        """
        with _lock:
            if index not in self._items:
                try:
                    with _private_randomness(self.seed + index):
                        self._items[index] = self._data[index]
                except Exception as error:
                    raise ConfigError(
                        f"dataset: reasoning-gym cannot generate item {index} of {self.name!r} with this "
                        f"configuration ({type(error).__name__}: {error})"
                    ) from error
                while len(self._items) > CACHED_ITEMS:
                    self._items.popitem(last=False)
            return self._items[index]

    def score(self, answer: str, item: Mapping[str, Any]) -> float:
        """Score an answer in this process: 0 to 1, and 0 if the scorer fails."""
        try:
            with _private_randomness(0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return float(self._data.score_answer(answer, item))
        except Exception:
            return 0.0

    def score_reply(self, answer: str, index: int) -> float:
        """Score an answer that a policy wrote, with a hard limit on time and memory.

        Raises:
            JudgeError: The answer could not be judged.
        """
        if len(answer) > LONGEST_ANSWER or not _is_safe(self.name, answer):
            return 0.0
        item = self.item(index)
        if self._compares_texts():
            return self.score(answer, item)
        try:
            return float(limited_calls.calls.call(__name__, "scored", self, answer, item))
        except limited_calls.OverLimitError:
            return 0.0

    def _compares_texts(self) -> bool:
        from reasoning_gym.dataset import ProceduralDataset

        return type(self._data).score_answer is ProceduralDataset.score_answer

    def solution(self, index: int) -> str | None:
        """Return the item's own answer, None if its scorer does not accept it."""
        item = self.item(index)
        answer = item["answer"]
        return answer if isinstance(answer, str) and self.score(answer, item) == 1.0 else None

    def refuse_if_fixed_answer_solves(self) -> None:
        """Try fixed answers, including those of other items, on the first items.

        Raises:
            ConfigError: One of them solves nearly all items, so a policy would learn to repeat it.
        """
        count = min(PROBED_ITEMS, self.size)
        misses = dict.fromkeys(FIXED_ANSWERS, 0)
        if count <= MAX_MISSES:
            return
        for index in range(count):
            item = self.item(index)
            if index < OTHER_ITEMS and isinstance(item["answer"], str):
                misses.setdefault(item["answer"], index)
            misses = {
                answer: missed
                for answer, missed in ((a, m + (self.score(a, item) != 1.0)) for a, m in misses.items())
                if missed <= MAX_MISSES
            }
            if not misses and index >= OTHER_ITEMS:
                return
        for answer, missed in misses.items():
            raise ConfigError(
                f"dataset: {self.name!r} is refused: the answer {answer[:60]!r} scores 1.0 on "
                f"{count - missed} of its first {count} items"
            )


def scored(dataset: Dataset, answer: str, item: Mapping[str, Any]) -> float:
    """Score an answer; called by `limited_calls` in its process."""
    return dataset.score(answer, item)


@lru_cache(maxsize=64)
def open_dataset(name: str, level: int | None, settings: str, seed: int, size: int) -> Dataset:
    """Open a dataset, or return it from the cache of this process; see `Dataset`."""
    return Dataset(name, level, settings, seed, size)


@lru_cache(maxsize=64)
def checked_dataset(name: str, level: int | None, settings: str, seed: int, size: int) -> Dataset:
    """Open a dataset, and refuse it if its scores would be meaningless.

    Raises:
        ConfigError: The name, level or settings are invalid, one fixed answer solves the dataset, or its
            items would differ in another process.
        MissingDependencyError: The extra `reasoning-gym` is not installed.
    """
    factory = _factory()
    if name not in factory.DATASETS or name == "composite":
        raise unknown("dataset", name, sorted(factory.DATASETS.keys() - {"composite"}))
    if name in BY_HASH_SEED and sys.flags.hash_randomization:
        raise ConfigError(
            f"dataset: {name!r} has different items in every process; start Python with PYTHONHASHSEED=0"
        )
    dataset = open_dataset(name, level, settings, seed, size)
    dataset.refuse_if_fixed_answer_solves()
    return dataset


def _factory() -> Any:
    try:
        with _private_randomness(0):
            from reasoning_gym import factory
    except ImportError as error:
        raise missing_extra(f"reasoning-gym is not installed ({error})", "reasoning-gym") from error
    return factory


def _config(name: str, level: int | None, settings: Mapping[str, Any], seed: int, size: int) -> Any:
    factory = _factory()
    kind = factory.DATASETS[name][1]
    known = [item.name for item in fields(kind) if item.name not in ("seed", "size")]
    for key in settings:
        if key not in known:
            raise unknown(f"config of the dataset {name}", key, known)
    try:
        if level is None:
            config = kind(**settings, seed=seed, size=size)
        else:
            config = _curriculum(name, level).generate_configuration({"seed": seed, "size": size})
            for key, value in settings.items():
                setattr(config, key, value)
        if hasattr(config, "validate"):
            config.validate()
    except ConfigError:
        raise
    except (AssertionError, TypeError, ValueError) as error:
        at = "" if level is None else f" at level {level}"
        raise ConfigError(f"config of the dataset {name}{at}: {error or type(error).__name__}") from error
    return config


def _curriculum(name: str, level: int) -> Any:
    factory = _factory()
    if not factory.has_curriculum(name):
        raise ConfigError(f"level: {level}, but the dataset {name!r} has no curriculum; use config instead")
    curriculum = factory.create_curriculum(name)
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values())
    if not 1 <= level <= highest:
        raise ConfigError(f"level: {level}, wanted 1 to {highest}, the levels of the dataset {name!r}")
    curriculum.set_global_level(level - 1)
    return curriculum


@contextmanager
def _private_randomness(seed: int) -> Iterator[None]:
    """Seed the global random generators, which some datasets use, and restore their states afterwards."""
    with _lock:
        kept = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _is_safe(name: str, answer: str) -> bool:
    """Return whether an answer is safe for a scorer that evaluates it."""
    try:
        if name in WHOLE_NUMBERS:
            return all(number >= 0 for number in whole_numbers(parse(answer)))
        return name not in EXPRESSIONS or _plain_expression(parse(answer))
    except CalculatorError:
        return False


def _plain_expression(node: ast.expr) -> bool:
    """Return whether an expression has only numbers, one-letter variables, + - * / ** and known functions."""
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return len(name) == 1 or name == "pi"
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _plain_expression(operand)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Pow(), left=left, right=right):
            return _plain_expression(left) and _plain_expression(right)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in FUNCTIONS and _plain_expression(argument)
    return False
