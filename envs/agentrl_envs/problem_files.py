"""Sources of problems: the generator, or JSONL and Parquet files such as those of GSM8K and MATH."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentrl.env import unknown
from agentrl.env.numbers import real_number
from agentrl.errors import ConfigError
from agentrl_envs.math_answers import LONGEST_ANSWER, last_boxed, number, require_math_verify
from agentrl_envs.problems import Check, Problem, generated

QUESTIONS = ("problem", "question", "prompt")
ANSWERS = ("answer", "final_answer", "solution")
WORKED = ("solution",)  # columns of worked solutions, whose answer is the marked result only
NO_NUMBERS = ("nan", "inf", "infinity")
TASK_TYPES = ("task_type", "type", "subject")

Row = tuple[str, Mapping[str, Any]]  # location for messages, content


def choose_problems(
    kinds: str | Sequence[str] | None,
    level: int | Sequence[int] | None,
    data: str | Path | Mapping[str, str] | None,
    test_share: float,
    check: Check | None,
) -> tuple[Mapping[str, Sequence[Problem]], str]:
    """Return the problems that an environment's arguments select, and the label shown with their scores.

    Raises:
        ConfigError: An argument is invalid, or excludes another.
        MissingDependencyError: The answers need the extra `math`, which is not installed.
    """
    if data is None:
        if check is not None:
            raise ConfigError(f"check: {check!r} applies only to files; generated problems set their own")
        return generated(kinds, 2 if level is None else level), "generated"
    if kinds is not None or level is not None:
        raise ConfigError("data: kinds and level apply only to generated problems; remove them, or data")
    problems = load_problems(data, test_share, check)
    if any(rows[0].check == "mathematics" for rows in problems.values()):
        require_math_verify()
    files = data.values() if isinstance(data, Mapping) else (data,)
    return problems, ", ".join(dict.fromkeys(Path(path).name for path in files))


def load_problems(
    data: str | Path | Mapping[str, str | Path], test_share: float = 0.1, check: Check | None = None
) -> Mapping[str, Sequence[Problem]]:
    """Read problems from files.

    A row has a column `problem`, `question` or `prompt`, and a column `answer`, `final_answer` or `solution`.
    In an answer in GSM8K's style the part after "####" counts, in a worked solution in MATH's style the last
    box; a `solution` must have one of the two. Scores are grouped by `task_type`, `type` or `subject` if
    present, else by the file's name.

    Args:
        data: A file (`.jsonl` or `.parquet`), or split -> file.
        test_share: The fraction of a single file's problems that forms the split "test": those with the
            smallest hashes of their question. Ignored if the rows have a column `split`, which then names
            the splits.
        check: How replies are judged: "number" or "mathematics". None selects "number" if every answer is a
            plain number, else "mathematics".

    Returns:
        Split -> its problems, in the order of the file.

    Raises:
        ConfigError: A file cannot be read, or a row is incomplete; the message names its line.
    """
    if check not in (None, "number", "mathematics"):
        raise unknown("check", check, ("number", "mathematics"))
    real_number("test_share", test_share, 0, 1)
    files = (
        {split: Path(path) for split, path in data.items()} if isinstance(data, Mapping) else {"": Path(data)}
    )
    read = {split: _read(*_version(path.expanduser())) for split, path in files.items()}
    rule = check or _rule(problem.answer for rows in read.values() for problem, _ in rows)
    if rule == "number":
        _refuse_other_than_numbers(read)
    splits: dict[str, list[Problem]] = {}
    for name, rows in read.items():
        for (problem, given), half in zip(rows, _halves(rows, test_share), strict=True):
            judged = Problem(problem.question, problem.answer, problem.task_type, rule)
            splits.setdefault(name or given or half, []).append(judged)
    return splits


def _version(path: Path) -> tuple[Path, int]:
    try:
        return path.resolve(), path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"data: {path} cannot be read: {error.strerror}") from error


Given = tuple[Problem, str | None]  # a problem and the split that its row names


@lru_cache(maxsize=8)
def _read(path: Path, version: int) -> tuple[Given, ...]:
    """Read the rows of a file; `version` is part of the cache key, so that a changed file is read again."""
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ConfigError(f"data: {path.name}, wanted a file ending in {' or '.join(readers)}")
    problems = tuple(_problem(place, row, path.stem) for place, row in readers[path.suffix](path))
    if not problems:
        raise ConfigError(f"data: {path} contains no problem")
    named = sum(split is not None for _, split in problems)
    if named not in (0, len(problems)):
        raise ConfigError(f"data: {path}: {named} of {len(problems)} rows name a split, wanted all or none")
    return problems


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            place = f"{path}:{line}"
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"data: {place}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"data: {place}: {type(row).__name__}, wanted an object")
            yield place, row


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            known = {*QUESTIONS, *ANSWERS, *TASK_TYPES, "split"}
            columns = [name for name in file.schema_arrow.names if name in known]
            rows = [row for part in file.iter_batches(columns=columns) for row in part.to_pylist()]
    except (ArrowException, OSError) as error:
        raise ConfigError(f"data: {path} cannot be read as a Parquet file: {error}") from error
    for index, row in enumerate(rows):
        yield f"{path}: row {index}", row


def _problem(place: str, row: Mapping[str, Any], stem: str) -> Given:
    question = row[_first(place, row, QUESTIONS)]
    if not isinstance(question, str):
        raise ConfigError(f"data: {place}: the question is {question!r}, wanted a string")
    column = _first(place, row, ANSWERS)
    answer = _answer(place, column, row[column])
    if not question.strip() or not answer:
        raise ConfigError(f"data: {place}: the {'answer' if question.strip() else 'question'} is empty")
    if len(answer) > LONGEST_ANSWER:
        raise ConfigError(
            f"data: {place}: the answer has {len(answer)} characters, wanted at most {LONGEST_ANSWER}; "
            "a worked solution needs '####' or \\boxed{} before its result"
        )
    for name in (*TASK_TYPES, "split"):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise ConfigError(f"data: {place}: {name!r} is {row[name]!r}, wanted a string")
    task_type = next((row[name] for name in TASK_TYPES if row.get(name)), stem)
    for text in (question, answer, task_type):
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ConfigError(f"data: {place}: {text[:60]!r} contains a lone surrogate, half a character")
    return Problem(question.strip(), answer, task_type), row.get("split") or None


def _first(place: str, row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    raise ConfigError(f"data: {place}: has {', '.join(row) or 'nothing'}; wanted one of {', '.join(names)}")


def _answer(place: str, column: str, given: object) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ConfigError(f"data: {place}: the answer is {given!r}, wanted a string or a number")
    text = given if isinstance(given, str) else format(Decimal(str(given)), "f")
    _, marked, final = text.rpartition("####")
    boxed = None if marked else last_boxed(text)
    if column in WORKED and not marked and boxed is None:
        raise ConfigError(
            f"data: {place}: the {column} marks no result; wanted it in \\boxed{{}} or after '####', "
            f"or a column {ANSWERS[0]!r}"
        )
    answer = (final if boxed is None else boxed).strip()
    if answer.lower().lstrip("+-") in NO_NUMBERS:
        raise ConfigError(f"data: {place}: the answer is {answer}, wanted a finite number or a text")
    return answer


def _rule(answers: Iterator[str]) -> Check:
    return "number" if all(number(answer) is not None for answer in answers) else "mathematics"


def _refuse_other_than_numbers(read: Mapping[str, Sequence[Given]]) -> None:
    for rows in read.values():
        for problem, _ in rows:
            if number(problem.answer) is None:
                raise ConfigError(
                    f"check: 'number' cannot judge the answer {problem.answer[:60]!r} to "
                    f"{problem.question[:60]!r}; wanted 'mathematics'"
                )


def _halves(rows: Sequence[Given], test_share: float) -> list[str]:
    """Assign each row to "train" or "test"; equal questions get the same split."""
    hashes = [hashlib.sha256(problem.question.encode()).digest() for problem, _ in rows]
    ranked = sorted(set(hashes))
    cut = min(max(1, round(test_share * len(ranked))), len(ranked) - 1)
    test = set(ranked[:cut])
    return ["test" if one in test else "train" for one in hashes]
