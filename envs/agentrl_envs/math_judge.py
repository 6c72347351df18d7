"""What math-verify says of an answer; imported only in processes of `bounded`."""

from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]


def judge(gold: str, answer: str, prose: bool) -> bool:
    """Whether an answer means the same as `gold`; in prose its last expression counts."""
    try:
        # The order matters: verify is not symmetric.
        right, given = _parsed(gold, False), _parsed(answer, prose)
        return bool(verify(right, given, timeout_seconds=None))
    except (Exception, RecursionError):
        return False


def _parsed(text: str, prose: bool) -> object:
    return parse(text if prose or "$" in text else f"\\boxed{{{text}}}", parsing_timeout=None)
