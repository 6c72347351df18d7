"""Comparison of answers that may take long; called by `limited_calls` in its process."""

import re

from agentrl_envs.mathematics.equality import same

_CALCULUS = re.compile(r"\\(?:(?:sum|prod|lim)\s*_|int(?![A-Za-z]))")

_SPACE = re.compile(r"\\[,;:! ]|\\(?:left|right|quad|limits|displaystyle)(?![A-Za-z])")
# One expression alone: no list, relation, words or decimal, and no capitals, which math-verify reads as
# small letters.
_EXPRESSION = re.compile(
    r"(?:\\(?:sum|prod|int|lim|d?frac|sqrt|pi|infty|sin|cos|tan|ln|log|exp|cdot|times|to)(?![A-Za-z])"
    r"|_\{[a-z] ?(?:=|\\to(?![a-z])) ?|[-+*/^_(){}|!\d ]|(?<![A-Za-z])[a-z]{1,3}(?![A-Za-z]))+"
)


def judge(gold: str, answer: str, rounded_digits: int | None, calculus: bool) -> bool:
    """Return whether an answer equals `gold`; `calculus` admits sums and limits, compared by math-verify."""
    if same(gold, answer, rounded_digits):
        return True
    return calculus and has_calculus(gold, answer) and _verified(gold, answer)


def has_calculus(gold: str, answer: str) -> bool:
    """Return whether one of two answers contains a sum, a product, an integral or a limit."""
    return any(map(_CALCULUS.search, (gold, answer)))


def _verified(gold: str, answer: str) -> bool:
    from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]

    texts = [_SPACE.sub(" ", text) for text in (gold, answer)]
    if not all(map(_EXPRESSION.fullmatch, texts)):
        return False
    try:
        right, said = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in texts)
        return bool(verify(right, said, float_rounding=30, numeric_precision=50, timeout_seconds=None))
    except (Exception, RecursionError):
        return False
