"""The datasets of reasoning-gym, generated item by item and scored by their own scorers.

reasoning-gym is imported by the first dataset that is opened; it takes seconds.
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
KEPT_ITEMS = 4_096

# Of 0.1.25: their items follow the order of sets of strings, which Python draws anew for every process.
BY_HASH_SEED = (
    "codeio",
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)

# Their scorers evaluate the answer as Python, or hand it to sympy, which does: not every text may get there.
EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
WHOLE_NUMBERS = ("countdown", "puzzle24")
EXPRESSIONS = ("intermediate_integration", "polynomial_multiplication", "simple_integration")
FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "Abs"),
)

JUNK = ("", "banana", "a" * 50, "0", "1", "True", "False", "Yes", "No", "[]", "None")
PROBED_ITEMS = 30
MISSES = 3  # of the probed items; an answer that misses fewer solves the dataset
FOREIGN_GOLDS = 3

_lock = threading.RLock()


class Dataset:
    """One dataset with its configuration and seed; equal ones are one object per process.

    Args:
        name: of reasoning-gym's.
        level: of its curriculum, from 1; None takes the dataset's default configuration.
        settings: other fields of its configuration, as JSON.
        seed: item i depends on it and i alone.
        size: number of items.
    """

    def __init__(self, name: str, level: int | None, settings: str, seed: int, size: int) -> None:
        self.key = name, level, settings, seed, size
        self.name, self.seed, self.size = name, seed, size
        factory = _factory()
        with _private_randomness(seed):
            self._data = factory.DATASETS[name][0](_config(name, level, json.loads(settings), seed, size))
        if name in EVALUATED:
            # The name is looked up in the scorer's module first.
            vars(sys.modules[type(self._data).__module__])["eval"] = ast.literal_eval
        self._items: OrderedDict[int, Mapping[str, Any]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, self.key

    def item(self, index: int) -> Mapping[str, Any]:
        """Item `index`: question, answer, metadata.

        Raises:
            ConfigError: reasoning-gym cannot generate it.
        """
        with _lock:
            if index not in self._items:
                try:
                    with _private_randomness(self.seed + index):
                        self._items[index] = self._data[index]
                except Exception as error:
                    raise ConfigError(
                        f"dataset: reasoning-gym generates no item {index} of {self.name!r} with this "
                        f"configuration ({type(error).__name__}: {error})"
                    ) from error
                while len(self._items) > KEPT_ITEMS:
                    self._items.popitem(last=False)
            return self._items[index]

    def score(self, answer: str, item: Mapping[str, Any]) -> float:
        """What its scorer says of an answer, in this process: 0 to 1, and 0 where it fails."""
        try:
            with _private_randomness(0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return float(self._data.score_answer(answer, item))
        except Exception:
            return 0.0

    def score_reply(self, answer: str, index: int) -> float:
        """The score of an answer that a policy wrote, found with a hard limit on the work.

        Raises:
            JudgeError: nothing could be found out about the answer.
        """
        if len(answer) > LONGEST_ANSWER or not _harmless(self.name, answer):
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
        """The item's own answer, if its scorer takes it."""
        item = self.item(index)
        answer = item["answer"]
        return answer if isinstance(answer, str) and self.score(answer, item) == 1.0 else None

    def refuse_if_junk_solves_it(self) -> None:
        """Try fixed answers, and those of other items, on the first items.

        Raises:
            ConfigError: one of them solves nearly all: a policy would learn to say just that.
        """
        count = min(PROBED_ITEMS, self.size)
        misses = dict.fromkeys(JUNK, 0)
        if count <= MISSES:
            return
        for index in range(count):
            item = self.item(index)
            if index < FOREIGN_GOLDS and isinstance(item["answer"], str):
                misses.setdefault(item["answer"], index)
            misses = {
                answer: missed
                for answer, missed in ((a, m + (self.score(a, item) != 1.0)) for a, m in misses.items())
                if missed <= MISSES
            }
            if not misses and index >= FOREIGN_GOLDS:
                return
        for answer, missed in misses.items():
            raise ConfigError(
                f"dataset: {self.name!r} is refused: the answer {answer[:60]!r} scores 1.0 on "
                f"{count - missed} of its first {count} items"
            )


def scored(dataset: Dataset, answer: str, item: Mapping[str, Any]) -> float:
    """Run by `limited_calls`."""
    return dataset.score(answer, item)


@lru_cache(maxsize=64)
def open_dataset(name: str, level: int | None, settings: str, seed: int, size: int) -> Dataset:
    """Open a dataset; see `Dataset`."""
    return Dataset(name, level, settings, seed, size)


@lru_cache(maxsize=64)
def checked_dataset(name: str, level: int | None, settings: str, seed: int, size: int) -> Dataset:
    """Open a dataset and refuse it where a score on it would mean nothing.

    Raises:
        ConfigError: its name, level or settings are wrong, junk solves it, or its items would be others in
            another process.
        MissingDependencyError: the extra `reasoning-gym` is not installed.
    """
    factory = _factory()
    if name not in factory.DATASETS or name == "composite":
        raise unknown("dataset", name, sorted(factory.DATASETS.keys() - {"composite"}))
    if name in BY_HASH_SEED and sys.flags.hash_randomization:
        raise ConfigError(
            f"dataset: {name!r} has other items in every process unless Python is started with "
            "PYTHONHASHSEED=0"
        )
    dataset = open_dataset(name, level, settings, seed, size)
    dataset.refuse_if_junk_solves_it()
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
    """Some datasets draw from the global generators: they find them seeded, and leave them as they were."""
    with _lock:
        kept = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _harmless(name: str, answer: str) -> bool:
    """Whether an answer may be handed to a scorer that evaluates it."""
    try:
        if name in WHOLE_NUMBERS:
            return all(number >= 0 for number in whole_numbers(parse(answer)))
        return name not in EXPRESSIONS or _plain_expression(parse(answer))
    except CalculatorError:
        return False


def _plain_expression(node: ast.expr) -> bool:
    """Numbers, variables of one letter, + - * / ** and elementary functions of one argument."""
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
