"""What is found out about an answer in a process with a limit; run by `bounded`."""

import re

from agentrl_envs.mathematics.equality import same

CALCULUS = re.compile(r"\\(?:sum|prod|int|lim)(?![A-Za-z])")

_SPACE = re.compile(r"\\[,;:! ]|\\(?:left|right|quad|limits|displaystyle)(?![A-Za-z])")
# One expression and nothing beside it: no list, no relation, no words, no decimal.
_EXPRESSION = re.compile(
    r"(?:\\(?:sum|prod|int|lim|d?frac|sqrt|pi|infty|sin|cos|tan|ln|log|exp|cdot|times|to)(?![A-Za-z])"
    r"|_\{[a-z] ?(?:=|\\to(?![a-z])) ?|[-+*/^_(){}|!\d ]|(?<![A-Za-z])[A-Za-z]{1,3}(?![A-Za-z]))+"
)


def judge(gold: str, answer: str, rounded_digits: int | None, calculus: bool) -> bool:
    """Whether an answer says the same as `gold`; of sums, integrals and limits, if `calculus`, by math-verify."""
    return same(gold, answer, rounded_digits) or (calculus and _verified(gold, answer))


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
