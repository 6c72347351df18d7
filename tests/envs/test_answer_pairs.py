"""Which replies are equal to which correct answer, by our own table and by the reference's."""

import json
from pathlib import Path

import pytest
from answer_pairs import MATHEMATICS, NUMBERS

from agentrl_envs import limited_calls
from agentrl_envs.math_answers import extract_answer, number, same_mathematics, same_number

FORMS = (r"\boxed{%s}", "<answer>%s</answer>", "%s")


def counts(check: str, gold: str, answer: str, form: str) -> bool:
    reply = form.replace("%s", answer)
    if check == "mathematics":
        return same_mathematics(gold, reply)
    return same_number(gold, extract_answer(reply))


def misjudged(
    checks: tuple[str, ...], gold: str, right: list[str], wrong: list[str]
) -> list[tuple[str, ...]]:
    return [
        (check, form, answer)
        for check in checks
        for form in FORMS
        for answers, wanted in ((right, True), (wrong, False))
        for answer in answers
        if counts(check, gold, answer, form) is not wanted
    ]


def test_the_table_is_large_and_most_of_it_is_wrong() -> None:
    rows = NUMBERS + MATHEMATICS
    right, wrong = (sum(len(row[place]) for row in rows) for place in (1, 2))
    assert len(rows) >= 80
    assert right >= 250
    assert wrong >= right


@pytest.mark.parametrize(("gold", "right", "wrong"), NUMBERS, ids=[row[0] for row in NUMBERS])
def test_numbers_count_in_every_form_and_by_both_checks(
    gold: str, right: list[str], wrong: list[str]
) -> None:
    pytest.importorskip("math_verify")
    assert misjudged(("number", "mathematics"), gold, right, wrong) == []


@pytest.mark.parametrize(("gold", "right", "wrong"), MATHEMATICS, ids=[row[0] for row in MATHEMATICS])
def test_mathematics_counts_in_every_form(gold: str, right: list[str], wrong: list[str]) -> None:
    pytest.importorskip("math_verify")
    assert misjudged(("mathematics",), gold, right, wrong) == []


@pytest.mark.reference
@pytest.mark.parametrize("check", ["number", "mathematics"])
def test_the_reference_pairs_have_no_false_positive(check: str, reference_folder: Path) -> None:
    pytest.importorskip("math_verify")
    rows = json.loads((reference_folder / "cases" / "answers" / "pairs.json").read_text())
    rows = [row for row in rows if check == "mathematics" or number(row[0]) is not None]
    for form in FORMS:
        verdicts = [(counts(check, gold, answer, form), wanted) for gold, answer, wanted in rows]
        assert verdicts.count((True, False)) == 0
        assert verdicts.count((False, True)) <= 0.02 * sum(wanted for _, wanted in verdicts)


@pytest.mark.parametrize(
    ("gold", "answer", "digits", "same"),
    [
        ("2/7", "0.285714", 6, True),
        ("2/7", "0.2857143", 6, True),
        ("2/7", "0.2857142", 6, False),  # truncated, not rounded
        ("2/7", "0.28571", 6, False),
        ("2/7", "0.286", 3, True),
        ("2/7", "0.29", 3, False),
        ("2/7", "0.285714", None, False),
        ("2/7", "2/7", None, True),
        ("2/7", "0.2857142857142857", None, False),
        ("200000/7", "28571.4", 6, True),
        ("200000/7", "28571", 5, False),  # a whole number does not count as a rounded one
        ("12", "12.0000004", 6, False),  # a rounded decimal does not count as a whole number
        (r"\sqrt{7}", "2.64575", 6, True),
        (r"\sqrt{7}", "2.6458", 6, False),
        (r"\sqrt{7}", "2.6458", 5, True),
        (r"\sqrt{7}", "2.64575", None, False),
        ("2.64575", r"\sqrt{7}", 6, False),  # the correct answer is the decimal
        ("-2/7", r"-28.5714\%", 6, True),
        (r"\frac{1}{4096}", "2.44141e-4", 6, True),
        (r"\frac{1}{4096}", r"2.4414 \times 10^{-4}", 6, False),
    ],
)
def test_a_rounded_decimal_counts_from_so_many_digits(
    gold: str, answer: str, digits: int | None, same: bool
) -> None:
    pytest.importorskip("math_verify")
    assert same_mathematics(gold, rf"\boxed{{{answer}}}", digits) is same
    if number(gold) is not None:
        assert same_number(gold, answer, digits) is same


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("0.3", "0.30000000000000004", True),
        ("0.3", "0.3000000002", True),
        ("0.3", "0.3000000004", False),
        ("0.3", "0.29999999985", True),
        ("3", "3.0000000001", False),
        ("0.0", "0.0000000001", False),
    ],
)
def test_a_decimal_is_met_within_a_billionth(gold: str, answer: str, same: bool) -> None:
    assert same_number(gold, answer) is same


TOO_MUCH = {
    "a tower": r"3^{3^{3^{25}}}",
    "powers of ten": "10^{10^{12}}",
    "a factorial": "900000!",
    "factorials": "((6!)!)!",
    "a binomial": r"\binom{900000}{300000}",
    "exponentials": r"e^{e^{e^{e^{9}}}}",
    "a sine": r"\sin(10^{10^{4}})",
    "a long power": "(x+1)^{700000}",
    "variables": "x^{x^{x^{x}}}",
    "an exponent": "1e888888888",
    "nested brackets": "(" * 990 + "3" + ")" * 990,
    "nested roots": r"\sqrt{" * 300 + "3" + "}" * 300,
    "open fractions": r"\frac{" * 390,
    "open texts": r"\text{" * 330,
    "names": "x=" * 990 + "4",
    "names in brackets": "(x=" * 39 + "1" + ")" * 39,
    "bars": "|" * 1_999,
    "functions": r"\cos " * 390 + "x",
    "sines": "+".join(rf"\sin {k}" for k in range(2, 190)),
    "a list": "1," * 990 + "1",
    "backslashes": "\\" * 1_999,
    "marks": "4" + "!" * 1_900,
    "accents": "a" + "\u0301" * 1_900,
    "half a character": "\ud83d",
}


@pytest.mark.parametrize("answer", TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_too_much_is_not_equal(answer: str) -> None:
    pytest.importorskip("math_verify")
    for gold in ("7", r"\sqrt{3}", "x+1", "[0,1)", r"\text{red}"):
        assert same_mathematics(gold, f"<answer>{answer}</answer>") is False
    assert same_number("7", answer) is False


def test_megabytes_are_not_equal_and_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_calls, "calls", None)
    for reply in ("7" * 2_000_000, "$7" * 900_000, r"\boxed{" * 100_000, "the answer is " * 100_000):
        for text in (reply, f"<answer>{reply}</answer>"):
            assert same_mathematics("7", text) is False
            assert same_number("7", extract_answer(text)) is False


def test_numbers_and_garbage_are_judged_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_calls, "calls", None)
    assert same_number("48", r"6 \times 2^3\text{ km}")
    assert not same_number("48", "xq zj 4w8 ~~ {{")
    assert same_mathematics(r"\{1,2\}", r"\boxed{2, \frac{3}{3}}")
    assert same_mathematics("x^2-1", r"\boxed{(x-1)(x+1)}")
    assert same_mathematics("[2,3)", r"\boxed{2 \le t < 3}")


@pytest.mark.parametrize(
    ("gold", "reply", "same"),
    [
        (r"\frac{2}{9}", r"Divide. So it is $\frac{4}{18}$.", True),
        (r"\frac{2}{9}", r"Therefore, the final answer is: \(\frac{2}{9}\)", True),
        ("9", "The answer is 9.", True),
        ("9", "It is not $9$.", False),
        ("9", "It is $9$ or $8$.", False),
        ("9", "The answer is about 9.", False),
        ("9", "It is $9$. No, it is $8$.", False),
        ("9", "It is 9. I am not sure.", False),
        ("9", "I counted 9 of them", False),
        ("9", r"\boxed{8}\boxed{9}", True),
        ("8", r"\boxed{8}\boxed{9}", False),
        ("8", r"It is \boxed{8} or \boxed{9}", False),
    ],
)
def test_of_prose_only_a_sentence_that_names_the_answer_counts(gold: str, reply: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert same_mathematics(gold, reply) is same


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n} k", True),
        (r"\int_0^1 x\,dx", r"\frac{1}{2}", True),
        (r"\lim_{x \to 0} \frac{\sin x}{x}", "1", True),
        (r"\int_0^1 x\,dx", "1", False),
        (r"\int_0^1 x\,dx", r"\frac{1}{2}, 1", False),
        (r"\int_0^1 x\,dx", r"\text{about } \frac12", False),
        (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k^2", False),
        (r"\sum_{k=1}^{3} k", "6.0000001", False),
    ],
)
def test_sums_and_integrals_are_judged_too(gold: str, answer: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert same_mathematics(gold, rf"\boxed{{{answer}}}") is same
