"""Problems read from JSONL and Parquet files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl_envs.problem_files import choose_problems, load_problems

GSM8K = [
    {"question": "Ann has 40 eggs and buys 2.", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"},
    {"question": "How many seconds are 20 minutes?", "answer": "20 * 60\n#### 1,200"},
]
MATH = [
    {
        "problem": "What is $1/2 + 1/3$?",
        "level": "Level 2",
        "type": "Prealgebra",
        "solution": r"First \boxed{x}. It is $\boxed{\frac{5}{6}}$.",
    },
    {
        "problem": "Solve $x^2 = 2$ for $x > 0$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"$\boxed{\sqrt{2}}$",
    },
]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"problem": f"{n} + 1 = ?", "answer": n + 1, **more} for n in range(count)]


def test_gsm8k_answers_are_what_follows_the_mark(tmp_path: Path) -> None:
    problems = load_problems({"train": jsonl(tmp_path / "gsm8k.jsonl", GSM8K)})["train"]
    assert [(p.answer, p.check, p.task_type) for p in problems] == [
        ("42", "number", "gsm8k"),
        ("1,200", "number", "gsm8k"),
    ]
    assert problems[1].solved_by("<answer>1200 seconds</answer>")


def test_math_answers_are_the_last_box_of_the_solution(tmp_path: Path) -> None:
    problems = load_problems({"test": jsonl(tmp_path / "math.jsonl", MATH)})["test"]
    assert [(p.answer, p.check, p.task_type) for p in problems] == [
        (r"\frac{5}{6}", "mathematics", "Prealgebra"),
        (r"\sqrt{2}", "mathematics", "Algebra"),
    ]


def test_boxes_of_any_make_mark_a_result(tmp_path: Path) -> None:
    solutions = [
        r"so $\boxed 6$.",
        r"thus \fbox{$6$} units",
        r"$\boxed{\text{now } \boxed{6}}$",
        "worked #### 6",
    ]
    rows = [{"problem": f"{place}?", "solution": text} for place, text in enumerate(solutions)]
    problems = load_problems({"train": jsonl(tmp_path / "x.jsonl", rows)})["train"]
    assert [problem.solved_by(r"\boxed{6}") for problem in problems] == [True] * 4
    assert [problem.solved_by(r"\boxed{7}") for problem in problems] == [False] * 4


def test_numbers_in_json_are_answers_as_they_are(tmp_path: Path) -> None:
    given = [12, 0.5, 1e-7, 1.5e22, -3.0]
    rows = [{"problem": f"{place}?", "answer": value} for place, value in enumerate(given)]
    problems = load_problems({"train": jsonl(tmp_path / "x.jsonl", rows)})["train"]
    assert {problem.check for problem in problems} == {"number"}
    replies = ["12", "1/2", "0.0000001", "15000000000000000000000", "-3"]
    assert [p.solved_by(reply) for p, reply in zip(problems, replies, strict=True)] == [True] * 5


def test_an_answer_stands_before_a_solution(tmp_path: Path) -> None:
    row = {"problem": "1 + 1?", "solution": "Add them.", "answer": "2", "subject": "sums"}
    problem = load_problems({"train": jsonl(tmp_path / "x.jsonl", [row])})["train"][0]
    assert (problem.answer, problem.task_type) == ("2", "sums")


def test_parquet_says_the_same_as_jsonl(tmp_path: Path) -> None:
    for rows in (GSM8K, MATH):
        lines = jsonl(tmp_path / "same.jsonl", rows)
        pq.write_table(pa.Table.from_pylist(list(rows)), tmp_path / "same.parquet")
        assert load_problems({"a": tmp_path / "same.parquet"}) == load_problems({"a": lines})
        lines.unlink()


def test_one_file_is_split_by_the_hash_of_its_questions(tmp_path: Path) -> None:
    rows = sums(50)
    splits = load_problems(jsonl(tmp_path / "a.jsonl", rows))
    assert {name: len(problems) for name, problems in splits.items()} == {"train": 45, "test": 5}
    turned = load_problems(jsonl(tmp_path / "b.jsonl", rows[::-1] + rows[:20]))
    assert {p.question for p in turned["test"]} == {p.question for p in splits["test"]}
    assert not {p.question for p in turned["test"]} & {p.question for p in turned["train"]}
    half = load_problems(tmp_path / "a.jsonl", test_share=0.5)
    assert len(half["test"]) == 25
    assert {p.question for p in splits["test"]} <= {p.question for p in half["test"]}
    assert len(load_problems(jsonl(tmp_path / "c.jsonl", sums(2)))["test"]) == 1


def test_a_column_names_the_split_and_so_does_a_mapping(tmp_path: Path) -> None:
    rows = [*sums(3, split="train"), *sums(1, split="validation")]
    named = load_problems(jsonl(tmp_path / "named.jsonl", rows))
    assert {name: len(problems) for name, problems in named.items()} == {"train": 3, "validation": 1}
    mapped = load_problems({"train": jsonl(tmp_path / "a.jsonl", sums(3)), "dev": tmp_path / "named.jsonl"})
    assert {name: len(problems) for name, problems in mapped.items()} == {"train": 3, "dev": 4}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", sums(3))
    assert len(load_problems({"train": path})["train"]) == 3
    jsonl(path, sums(4))
    assert len(load_problems({"train": path})["train"]) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "a", "answer": "1"}\n{"problem": "b"', r"a\.jsonl:2: not a line of JSON"),
        ('{"problem": "a", "answer": "1"}\n\n[1]', r"a\.jsonl:3: list, wanted an object"),
        ('{"problem": "a", "anser": "1"}', r"a\.jsonl:1: has problem, anser; wanted one of answer"),
        ('{"text": "a", "answer": "1"}', r"a\.jsonl:1: has text, answer; wanted one of problem"),
        ('{"problem": "a", "answer": null}', r"a\.jsonl:1: has problem, answer; wanted one of answer"),
        ('{"problem": 3, "answer": "1"}', r"a\.jsonl:1: the question is 3, wanted a string"),
        ('{"problem": "a", "answer": [1]}', r"a\.jsonl:1: the answer is \[1\]"),
        ('{"problem": "a", "answer": true}', r"a\.jsonl:1: the answer is True"),
        ('{"problem": " ", "answer": "1"}', r"a\.jsonl:1: the question is empty"),
        ('{"problem": "a", "answer": "so\\n####"}', r"a\.jsonl:1: the answer is empty"),
        ('{"problem": "a", "answer": "1", "type": 5}', r"a\.jsonl:1: 'type' is 5"),
        ('{"problem": "a", "answer": "%s"}' % ("so " * 900), r"a\.jsonl:1: the answer has 2699 characters"),
        ('{"problem": "a", "answer": "1", "split": "train"}\n{"problem": "a", "answer": "1"}', "1 of 2 rows"),
        (
            '{"problem": "a", "answer": "1"}\n{"problem": "b", "solution": "Add."}',
            r"a\.jsonl:2: the solution marks",
        ),
        ('{"problem": "a", "solution": "12"}', r"a\.jsonl:1: the solution marks no result; wanted it in"),
        ('{"problem": "a", "answer": NaN}', r"a\.jsonl:1: the answer is NaN, wanted a finite number"),
        (
            '{"problem": "a", "answer": 1}\n{"problem": "b", "answer": -1e400}',
            r"a\.jsonl:2: the answer is -Infinity",
        ),
        ('{"problem": "a", "answer": "#### nan"}', r"a\.jsonl:1: the answer is nan"),
        ('{"problem": "a", "answer": "-inf"}', r"a\.jsonl:1: the answer is -inf"),
        ('{"problem": "a\\udc00", "answer": "1"}', r"a\.jsonl:1: 'a\\udc00' contains a lone surrogate"),
        ('{"problem": "a", "answer": ' + "[" * 100_000, r"a\.jsonl:1: not a line of JSON"),
        ("\n", "contains no problem"),
        ('{"problem": "\xff", "answer": "1"}', r"a\.jsonl:1: not a line of JSON"),
    ],
)
def test_bad_lines_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        load_problems(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_problems(tmp_path / "absent.jsonl")
    (tmp_path / "a.csv").write_text("problem,answer\n")
    with pytest.raises(ConfigError, match=r"a\.csv, wanted a file ending in \.jsonl or \.parquet"):
        load_problems(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="cannot be read as a Parquet file"):
        load_problems(tmp_path / "a.parquet")
    pq.write_table(pa.table({"problem": ["a", "b"], "answer": ["1", ""]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: row 1: the answer is empty"):
        load_problems(tmp_path / "b.parquet")


def test_the_check_can_be_chosen_and_numbers_must_be_numbers(tmp_path: Path) -> None:
    numbers, words = jsonl(tmp_path / "n.jsonl", GSM8K), jsonl(tmp_path / "w.jsonl", MATH)
    assert load_problems({"a": numbers}, check="mathematics")["a"][0].check == "mathematics"
    with pytest.raises(ConfigError, match="check: 'number' cannot judge the answer"):
        load_problems({"a": words}, check="number")
    with pytest.raises(ConfigError, match="check 'exact' is unknown"):
        load_problems({"a": words}, check="exact")  # type: ignore[arg-type]
    for share in (0, 1, 1.5):
        with pytest.raises(ConfigError, match=f"test_share: {share}"):
            load_problems(numbers, share)


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "n.jsonl", GSM8K))
    assert choose_problems(None, None, path, 0.5, None)[1] == "n.jsonl"
    assert choose_problems("gcd", 1, None, 0.1, None)[1] == "generated"
    with pytest.raises(ConfigError, match="apply only to generated problems"):
        choose_problems("gcd", None, path, 0.1, None)
    with pytest.raises(ConfigError, match="check: 'number' applies only to files"):
        choose_problems("gcd", None, None, 0.1, "number")


def test_without_the_extra_only_files_of_plain_numbers_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choose_problems(None, None, str(jsonl(tmp_path / "n.jsonl", GSM8K)), 0.5, None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[math\]'"):
        choose_problems(None, None, str(jsonl(tmp_path / "w.jsonl", MATH)), 0.5, None)
