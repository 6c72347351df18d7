"""Refusing a number that is outside its bounds: for the arguments of environments."""

from agentrl.errors import ConfigError

MAX_STEPS = 1_000_000  # of an episode


def whole_number(name: str, value: object, minimum: int, most: int = 1_000_000) -> int:
    """Return `value`, if it is a whole number within bounds.

    >>> whole_number("max_steps", 30, 1, 100)
    30

    Raises:
        ConfigError: it is not, with its name and the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= most:
        raise ConfigError(
            f"{name}: {_shown(value)}, wanted a whole number of at least {minimum} and at most {most}"
        )
    return value


def real_number(name: str, value: object, above: float, below: float) -> float:
    """Return `value`, if it is a number between two others.

    >>> real_number("test_share", 0.1, 0, 1)
    0.1

    Raises:
        ConfigError: it is not, with its name and the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        raise ConfigError(
            f"{name}: {_shown(value)}, wanted a number of more than {above} and less than {below}"
        )
    return value


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "a very large integer"
    return text if len(text) <= 60 else f"{text[:57]}..."
