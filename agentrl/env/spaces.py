"""The observation and action space of text environments."""

import string
from typing import Any

from gymnasium.spaces import Text

_SAMPLED_LENGTH = 32


class TextSpace(Text):
    """Space of all strings of at most `max_length` characters.

    By default, `gymnasium.spaces.Text` refuses the empty string and every character that is not an ASCII
    letter or digit, including spaces. `sample` draws short strings of printable ASCII.
    """

    def __init__(self, max_length: int = 1_000_000, *, seed: int | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        """Return whether `x` is a string of at most `max_length` characters."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return a random string of up to 32 printable ASCII characters."""
        if mask is not None or probability is not None:
            return super().sample(mask, probability)
        length = int(self.np_random.integers(0, min(self.max_length, _SAMPLED_LENGTH) + 1))
        return "".join(self.np_random.choice(self.character_list, size=length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash((TextSpace, self.max_length))

    def __repr__(self) -> str:
        return f"TextSpace(max_length={self.max_length})"
