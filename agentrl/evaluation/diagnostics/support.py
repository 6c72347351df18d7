"""Compare what a trained policy and its base solve (Invisible Leash)."""

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

DELTA = 0.05  # the chance to miss a solution of probability eps


@dataclass(frozen=True, slots=True)
class Support:
    """Number of correct completions that two policies reached within the same number of plays.

    Args:
        kept: Reached by both (P).
        gained: Reached by the trained policy alone (E).
        lost: Reached by the base alone (S).

    Source: The Invisible Leash, 2025; the section on metrics.
    """

    kept: int
    gained: int
    lost: int

    @property
    def retention(self) -> float | None:
        """Return the share of the base's support that is kept: SRR = P / (P + S); None without any."""
        return _ratio(self.kept, self.kept + self.lost)

    @property
    def discovery(self) -> float | None:
        """Return the share of the trained policy's support that is new: NDR = E / (P + E)."""
        return _ratio(self.gained, self.kept + self.gained)

    @property
    def balance(self) -> float | None:
        """Return the harmonic mean of both: SDS = 2 SRR NDR / (SRR + NDR); 0 if both are 0."""
        kept, new = self.retention, self.discovery
        if kept is None or new is None:
            return None
        return 2 * kept * new / (kept + new) if kept + new else 0.0

    @property
    def change(self) -> float | None:
        """Return the net change of the support: NSCR = (E - S) / (P + E + S)."""
        return _ratio(self.gained - self.lost, self.kept + self.gained + self.lost)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values under the names of the paper."""
        counts = {"kept": self.kept, "gained": self.gained, "lost": self.lost}
        rates = {"SRR": self.retention, "NDR": self.discovery, "SDS": self.balance, "NSCR": self.change}
        return counts | rates


def compare_support(base: Collection[Hashable], trained: Collection[Hashable]) -> Support:
    """Count what two policies reached.

    >>> compare_support({"a", "b"}, {"b", "c"})
    Support(kept=1, gained=1, lost=1)
    """
    before, after = set(base), set(trained)
    return Support(len(before & after), len(after - before), len(before - after))


def visible_probability(plays: int, delta: float = DELTA) -> float:
    """Return the least probability at which `plays` plays miss a solution with a chance of at most `delta`.

        (1 - eps)^k <= delta,   so eps = 1 - delta^(1 / k)

    A solution that was not seen may well have a lower probability than that.

    >>> round(visible_probability(4096), 6)
    0.000731
    """
    return float(1 - delta ** (1 / plays))


def answer_entropy(answers: Sequence[Hashable]) -> float:
    """Return the entropy in nats of the shares of the different answers to a task.

    >>> round(answer_entropy("aabb"), 4)
    0.6931
    """
    shares = [count / len(answers) for count in Counter(answers).values()]
    return -sum(share * log(share) for share in shares) + 0.0


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
