"""Show tables, episode counts and written files in the terminal."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from agentrl.terminal import echo

if TYPE_CHECKING:
    from rich.console import Console

    from agentrl.data.trajectory import Episode
    from agentrl.evaluation.diagnostics.findings import Findings


def console() -> "Console":
    """Return a console that prints all text literally."""
    from agentrl.terminal import Terminal

    return Terminal()


def echo_written(files: dict[Path, str], to_add: str | None, folder: Path) -> None:
    """Say what each new file is for, and what to add to a pyproject.toml that was left unchanged."""
    for path, what in files.items():
        echo(f"{path}: {what}")
    if to_add is not None:
        echo(f"{folder / 'pyproject.toml'} is left unchanged; add to it:\n\n{to_add}")


def show_findings(findings: "Findings") -> None:
    """Print the table and the notes of a diagnostic."""
    echo(f"\n{findings.title}", style="bold cyan")
    console().print(findings.to_table())
    for note in findings.notes:
        echo(note)


class EpisodeCounter:
    """Live count of episodes on the terminal during an evaluation."""

    def __init__(self, what: str) -> None:
        from agentrl.terminal import Terminal

        self._what = what
        quiet = logging.getLogger("agentrl").level > logging.INFO
        self._status = Terminal(stderr=True, quiet=quiet).status(what)
        self._episodes = self._successes = 0

    def __enter__(self) -> "EpisodeCounter":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, episode: "Episode") -> None:
        """Count an episode that has ended."""
        self._episodes += 1
        self._successes += episode.success
        self._status.update(f"{self._what}: {self._episodes} episodes, {self._successes} successes")
