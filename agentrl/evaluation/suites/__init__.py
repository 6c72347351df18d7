"""Suites: lists of panels, shipped as YAML files or written by users in the same form."""

from dataclasses import dataclass
from pathlib import Path

from agentrl.config import build, read_yaml, suggestion
from agentrl.env.panel import Panel, load_panel
from agentrl.errors import ConfigError
from agentrl.run.settings import PanelConfig

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _Suite:
    """A suite file; an entry is a panel file, relative to it, or a block as in `evaluation.panels`."""

    panels: tuple[str | PanelConfig, ...]


def shipped_suites() -> list[str]:
    """Return the names of the suites that come with agentrl."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def read_suite(name: str | Path) -> tuple[Panel | PanelConfig, ...]:
    """Return the panels of a suite.

    Args:
        name: The name of a shipped suite, or a YAML file with a list `panels`.

    Raises:
        ConfigError: If there is no such suite, it is empty, or an entry is malformed.
        PanelError: If a panel file that it names cannot be read.
    """
    path = _FOLDER / f"{name}.yaml" if str(name) in shipped_suites() else Path(name)
    if not path.is_file():
        hint = suggestion(str(name), shipped_suites())
        raise ConfigError(f"suite {name}: there is no such suite or file; {hint}")
    try:
        entries = build(_Suite, read_yaml(path)).panels
    except ConfigError as error:
        raise ConfigError(f"suite {path}: {error}") from error
    if not entries:
        raise ConfigError(f"suite {path}: panels is empty, wanted at least one panel")
    return tuple(load_panel(path.parent / entry) if isinstance(entry, str) else entry for entry in entries)
