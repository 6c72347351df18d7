"""Failed episodes: which are played again, which tasks are skipped, and how many aborts are too many."""

from collections import Counter
from collections.abc import Iterable, Sequence

from agentrl.data.trajectory import Episode, StopReason
from agentrl.errors import TooManyAbortedError

_RETRIED = (StopReason.ENV_ERROR, StopReason.WORKER_ERROR)
_MAX_BYSTANDER_ATTEMPTS = 10  # attempts of one episode that ended because of failures elsewhere


class Quarantine:
    """Tasks that failed several times in a row, in any episode, and are not played any more.

    Args:
        after: The number of failures in a row that puts a task here; None for never.

    Attributes:
        tasks: The reason for each task in quarantine.
    """

    def __init__(self, after: int | None = None) -> None:
        self._after = after
        self._failures: Counter[str] = Counter()
        self.tasks: dict[str, str] = {}

    def add(self, task: str, reason: str) -> None:
        """Count a failure of a task."""
        self._failures[task] += 1
        if self._after is not None and self._failures[task] >= self._after:
            self.tasks[task] = f"quarantined after {self._after} failures in a row, the last: {reason}"

    def clear(self, task: str) -> None:
        """Reset the failure count of a task that was played to its end."""
        self._failures.pop(task, None)


class Retries:
    """Decision whether a failed episode is played again.

    Args:
        max_attempts: The number of attempts per episode. An attempt that ended only because of a failure
            elsewhere does not count.
        quarantine: The tasks that are not played any more; failures are counted there.
    """

    def __init__(self, max_attempts: int, quarantine: Quarantine) -> None:
        self._max_attempts = max_attempts
        self._quarantine = quarantine
        self._bystander_attempts: Counter[str] = Counter()

    def next_attempt(self, episode: Episode, attempt: int, *, bystander: bool) -> int | None:
        """Count a failure and return the number of the next attempt, or None if the episode stays as it is.

        Args:
            episode: The episode as it ended.
            attempt: The number of the attempt that ended, from 1.
            bystander: Whether it ended because of a failure elsewhere.
        """
        if bystander:
            self._bystander_attempts[episode.id] += 1
        elif episode.stop not in _RETRIED or episode.task in self._quarantine.tasks:
            return None
        else:
            self._quarantine.add(episode.task, episode.error or "")
            attempt += 1
        if attempt > self._max_attempts or self._bystander_attempts[episode.id] >= _MAX_BYSTANDER_ATTEMPTS:
            return None
        return attempt


def check_aborted(episodes: Iterable[Episode], allowed: float) -> None:
    """Check that no more episodes were aborted than allowed.

    Raises:
        TooManyAbortedError: More were; the error lists the most frequent reasons.
    """
    aborted = [episode for episode in episodes if episode.stop.aborted]
    if len(aborted) > allowed:
        raise TooManyAbortedError(
            f"{len(aborted)} episodes were aborted, more than {allowed:g} allowed:\n"
            + "\n".join(f"{count} x {reason}" for reason, count in abort_reasons(aborted, 3))
        )


def abort_reasons(episodes: Sequence[Episode], most: int | None = None) -> list[tuple[str, int]]:
    """Return the reasons why episodes were aborted with their counts, the most frequent first."""
    aborted = [episode for episode in episodes if episode.stop.aborted]
    return Counter(
        f"{episode.stop.value}: {episode.error}" if episode.error else episode.stop.value
        for episode in aborted
    ).most_common(most)
