"""Timers of a run's activities, summed over all its sessions."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agentrl.files import write_atomic
from agentrl.run.records import read_timers


class Timers:
    """Seconds per activity, kept in a file.

    Args:
        path: The file; the timers continue from its content.
        writes: Whether this process writes the file.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._seconds = defaultdict[str, float](float)
        self._seconds.update(read_timers(path))

    @contextmanager
    def running(self, activity: str) -> Iterator[None]:
        """Time the block: `ACTIVITY.wall`, and `ACTIVITY.cpu` over all threads of this process."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.add(f"{activity}.wall", time.perf_counter() - wall)
            self.add(f"{activity}.cpu", time.process_time() - cpu)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a timer."""
        self._seconds[name] += seconds

    def save(self) -> None:
        """Write the file, if this process is the one that writes it."""
        if self._writes:
            write_atomic(self._path, json.dumps(self._seconds, indent=1))

    def read(self) -> Mapping[str, float]:
        """Return the seconds so far by name, rounded to hundredths."""
        return {name: round(value, 2) for name, value in sorted(self._seconds.items())}
