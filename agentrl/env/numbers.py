"""Range checks for the numeric arguments of environments."""

from agentrl.errors import ConfigError

MAX_STEPS = 1_000_000  # per episode


def whole_number(name: str, value: object, minimum: int, maximum: int = 1_000_000) -> int:
    """Return `value` if it is an integer in [minimum, maximum].

    >>> whole_number("max_steps", 30, 1, 100)
    30

    Raises:
        ConfigError: It is not; the message gives the name and the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ConfigError(
            f"{name}: {_describe_value(value)}, "
            f"wanted a whole number of at least {minimum} and at most {maximum}"
        )
    return value


def real_number(name: str, value: object, above: float, below: float) -> float:
    """Return `value` if it is a number in the open interval (above, below).

    >>> real_number("test_share", 0.1, 0, 1)
    0.1

    Raises:
        ConfigError: It is not; the message gives the name and the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        raise ConfigError(
            f"{name}: {_describe_value(value)}, wanted a number of more than {above} and less than {below}"
        )
    return value


def _describe_value(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not convert integers of more than 4,300 digits
        return "a very large integer"
    return text if len(text) <= 60 else f"{text[:57]}..."
