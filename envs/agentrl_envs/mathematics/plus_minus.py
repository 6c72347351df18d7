r"""Expansion of \pm into two answers."""

from agentrl_envs.mathematics.kinds import Answer, Call, Expression, Items, Named, Value


def both_signs(answer: Answer) -> list[Answer]:
    r"""Return an answer for each sign of its \pm."""
    plus, minus = _signed(answer, "+"), _signed(answer, "-")
    return [plus] if plus == minus else [plus, minus]


def _signed(answer: Answer, sign: str) -> Answer:
    match answer:
        case Value(expression, behind, percent):
            return Value(_with_sign(expression, sign), behind, percent)
        case Named(name, value):
            return Named(name, _signed(value, sign))
        case Items(brackets, items, either):
            return Items(brackets, tuple(_signed(item, sign) for item in items), either)
    return answer


def _with_sign(expression: Expression, sign: str) -> Expression:
    match expression:
        case Call("pm" | "mp" as function, (left, right)):
            left, right = _with_sign(left, sign), _with_sign(right, sign)
            negative = (sign == "-") == (function == "pm")
            return Call("+", (left, Call("-", (right,)) if negative else right))
        case Call(function, arguments):
            return Call(function, tuple(_with_sign(argument, sign) for argument in arguments))
    return expression
