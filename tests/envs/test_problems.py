"""Generated problems: what they depend on, their splits, and that their own work solves them."""

import subprocess
import sys
from fractions import Fraction

import pytest

from agentrl.errors import ConfigError
from agentrl_envs.calculator import calculate
from agentrl_envs.problems import KINDS, LEVELS, SPLITS, Problem, generated

EACH = [(kind, level) for kind in KINDS for level in LEVELS]


@pytest.mark.parametrize(("kind", "level"), EACH)
def test_the_work_leads_to_the_answer_and_the_answer_is_right(kind: str, level: int) -> None:
    for problems in generated(kind, level).values():
        for problem in problems[:60]:
            values = [calculate(expression) for expression in problem.work]
            assert problem.solved_by(problem.answer)
            assert problem.solved_by(rf"\boxed{{{problem.answer}}}")
            assert problem.task_type == kind
            if kind == "countdown":
                assert problem.work[-1] == problem.answer
                assert f"make {values[-1]}." in problem.question
            else:
                assert values[-1] == problem.answer


@pytest.mark.parametrize(("kind", "level"), EACH)
def test_no_question_is_in_both_splits(kind: str, level: int) -> None:
    train, test = ({p.question for p in problems[:300]} for problems in generated(kind, level).values())
    assert train
    assert len(test) >= 30  # even the easiest levels have enough test problems
    assert not train & test


def test_any_level_keeps_to_the_same_side() -> None:
    easy, mixed = generated(level=1), generated(level=(1, 2))
    asked = {problem.question for problem in easy["test"][:700]}
    assert not asked & {problem.question for problem in mixed["train"][:700]}


def test_linear_equations_hold_for_the_answer() -> None:
    for level in LEVELS:
        for problem in generated("linear_equation", level)["train"][:60]:
            left, right = problem.question.removeprefix("Solve for x: ").split(" = ")
            x = f"({problem.answer})"
            assert calculate(left.replace("x", x)) == calculate(right.replace("x", x))


def test_base_conversions_read_back() -> None:
    for level in LEVELS:
        for problem in generated("base_conversion", level)["train"][:60]:
            words = problem.question.rstrip(".").split()
            given, written, wanted = int(words[3]), words[5], int(words[-1])
            assert int(written, given) == int(problem.answer, wanted)


def test_levels_differ_in_the_size_of_the_work() -> None:
    for kind in ("arithmetic", "word_problem", "countdown"):
        sizes = [
            sum(len("".join(problem.work)) for problem in generated(kind, level)["train"][:50])
            for level in LEVELS
        ]
        assert sizes == sorted(sizes), kind


def test_kinds_take_turns_and_a_range_mixes_levels() -> None:
    assert [problem.task_type for problem in generated()["test"][: len(KINDS)]] == list(KINDS)
    lengths = {len(problem.work[0].split()) for problem in generated("arithmetic", (1, 3))["train"][:50]}
    assert {3, 5, 7} <= lengths


def test_a_problem_depends_on_its_index_and_nothing_before() -> None:
    problems = generated()["train"]
    assert problems[123_456] == generated()["train"][123_456]
    assert problems[-1] == problems[SPLITS["train"] - 1]
    assert problems[5:8] == [problems[5], problems[6], problems[7]]
    assert next(iter(problems)) == problems[0]
    assert len(problems) == SPLITS["train"]
    assert generated(seed=1)["train"][0] != problems[0]
    with pytest.raises(IndexError):
        problems[len(problems)]


def test_problems_are_the_same_in_another_process() -> None:
    script = (
        "from agentrl_envs.problems import generated; print([p.question for p in generated()['test'][:14]])"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    assert told[0] == told[1] == f"{[p.question for p in generated()['test'][:14]]}\n"


COUNTDOWN = Problem("make 88", "(25 - 3) * 4", "countdown", "countdown", ("(25 - 3) * 4",), (3, 4, 25, 25))


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("(25 - 3) * 4", True),
        ("4*(25-3) = 88", True),
        (r"\boxed{4 × (25 − 3)}", True),
        (r"\boxed{4 \times \left(25 - 3\right) = 88}", True),
        ("$4*(25-3)$.", True),
        ("4*(25-3) = 88.0", True),
        ("4*(25-3) = 88 = 88", True),
        ("4*(25-3) = 87", False),
        ("4*(25-3) = 88 = 87", False),
        ("4*(25-3) = -88", False),
        ("4*(25-3) = 80 + 8", False),
        ("4*(25-3) =", False),
        ("4*(25-3) = x", False),
        ("4*(25-3) = 88 or so", False),
        ("25 + 3 = 88", False),
        ("<answer>25 * 4 - 3 * 4</answer>", False),  # 88, but with two fours
        ("25 + 25 + 3 * 4", False),  # 62
        ("88", False),
        ("44 * 2", False),
        ("25 * 4 - 3 - 25 / 25", False),  # three of 25
        ("4 * (25 - 3) + 25 - 25", False),
        ("-3 * 4 + 25 * 4", False),
        ("", False),
        ("banana", False),
        ("4 ** 3 + 25", False),
        ("1 / 0", False),
    ],
)
def test_countdown_takes_every_expression_of_the_numbers(reply: str, right: bool) -> None:
    assert COUNTDOWN.solved_by(reply) is right


def test_all_of_a_problem_is_content() -> None:
    assert Problem(**COUNTDOWN.content()) == COUNTDOWN
    assert COUNTDOWN.content()["numbers"] == (3, 4, 25, 25)


def test_fractions_are_right_however_they_are_written() -> None:
    problem = next(p for p in generated("linear_equation", 5)["train"][:50] if p.answer.endswith("/3"))
    value = Fraction(problem.answer)
    assert problem.solved_by(rf"x = \frac{{{value.numerator}}}{{{value.denominator}}}")
    assert not problem.solved_by(str(float(value)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": "arithmetics"}, "kind of problem 'arithmetics' is unknown; did you mean 'arithmetic'"),
        ({"kinds": []}, "kinds: \\[\\], wanted some of"),
        ({"kinds": ["gcd", "gcd"]}, "each once"),
        ({"level": 0}, "level: 0, wanted 1 to 5"),
        ({"level": 6}, "level: 6"),
        ({"level": (3, 2)}, "level: \\(3, 2\\)"),
        ({"level": (1, 2, 3)}, "level: \\(1, 2, 3\\)"),
        ({"level": True}, "level: True"),
    ],
)
def test_wrong_kinds_and_levels_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generated(**settings)  # type: ignore[arg-type]
