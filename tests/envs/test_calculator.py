"""The calculator tool."""

import sys

import pytest

from agentrl_envs.calculator import MAX_DIGITS, CalculatorError, calculate, parse, whole_numbers


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4)", "84"),
        ("28 / 12", "7/3"),
        ("0.1 + 0.2", "3/10"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ^ 10", "1024"),
        ("2 ** -3", "1/8"),
        ("(-1) ** 10 ** 20", "1"),
        ("3 × 4 ÷ 6 − 1", "1"),
        ("1 < 2 <= 2", "True"),
        ("1 / 3 == 0.5", "False"),
        ("gcd(12, 18, 8)", "2"),
        ("lcm(4, 6)", "12"),
        ("sqrt(9 / 4)", "3/2"),
        ("max(1, 5/2, 2)", "5/2"),
        ("abs(-3) + floor(2.5) + ceil(2.5) + round(2.6)", "11"),
        ("factorial(5)", "120"),
        (f"10 ** {MAX_DIGITS - 1}", "1" + "0" * (MAX_DIGITS - 1)),
        ("\n 1 +\n 1 \t", "2"),
    ],
)
def test_values_are_exact(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("", "empty"),
        ("1 +", "not an expression"),
        ("3 = 3", "not an expression"),
        ("2x", "'2x'; write products"),
        ("1e5", "'1e'"),
        ("0x10", "'0x'"),
        ("1 / (2 - 2)", "division by zero"),
        ("5 % 0", "division by zero"),
        ("5 // 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("2 ** 0.5", "whole number"),
        ("sqrt(2)", "sqrt\\(2\\) is not a fraction"),
        ("gcd(0.5, 2)", "1/2 is not a whole number"),
        ("max(1)", "max was given 1"),
        ("(1 < 2) + 1", "a comparison is no number"),
        ("1.2345678901234567", "15 digits"),
        ("x + 1", "'x' is unknown; functions: abs"),
        ("__import__(1)", "'__import__' is unknown"),
        ("gcd(*(1, 2))", "only numbers"),
        ("gcd(a=1)", "only numbers"),
        ("(1).real", "only numbers"),
        ("[1][0]", "only numbers"),
        ("True", "only numbers"),
        ("lambda: 1", "only numbers"),
        ("1 if 1 else 2", "only numbers"),
        ("'a' * 9", "cannot read"),
        ("1 and 2", "only numbers"),
        ("1,234", "only numbers"),
    ],
)
def test_what_is_no_arithmetic_is_an_error_that_says_so(expression: str, complaint: str) -> None:
    with pytest.raises(CalculatorError, match=complaint):
        calculate(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "2 ** (2 ** (2 ** 30))",
        "9 ** 9 ** 9",
        "(2 ** 4000) ** 2",
        "(1/7) ** 5000",
        "factorial(10 ** 9)",
        "lcm(" + ", ".join(f"10 ** 290 + {i}" for i in range(15)) + ")",
        f"10 ** {MAX_DIGITS}",
        "9" * 499,
        "9" * 501,
        "-" * 400 + "1",
        "(" * 240 + "1" + ")" * 240,
        "1 / " * 120 + "1",
    ],
)
def test_towers_and_depths_are_refused_before_they_are_computed(expression: str) -> None:
    with pytest.raises(CalculatorError):
        calculate(expression)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="warnings are caught per thread from 3.14 on")
def test_reading_gives_no_warnings() -> None:
    # pytest would report warnings; Python warns about "1or 2", "5(3)" and "1 is 1" when it compiles them.
    for expression in ("1or 2", "5(3)", "1 is 1"):
        with pytest.raises(CalculatorError):
            calculate(expression)


def test_the_whole_numbers_of_an_expression_are_found_or_it_is_refused() -> None:
    assert list(whole_numbers(parse("(25 - 3) * 4 / 2"))) == [25, 3, 4, 2]
    for expression in ("2 ** 3", "-3 + 4", "1.5 + 2", "gcd(4, 2)", "4 // 2"):
        with pytest.raises(CalculatorError, match="only whole numbers"):
            list(whole_numbers(parse(expression)))
