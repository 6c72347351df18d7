"""The options before any command: the version, the traceback, and how much is said."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

import agentrl
from agentrl.errors import ConfigError
from agentrl.terminal import echo


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"agentrl {agentrl.__version__}")
        raise typer.Exit


def every_command(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="AGENTRL_DEBUG", help="Show the traceback of an error.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show debug messages and all warnings."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only warnings, errors and results.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train LLM agents on multi-turn text tasks by reinforcement learning.

    Run `agentrl train` to train a small agent on household games in a few minutes on a CPU.
    Run `agentrl train --help` for help on a command.
    """
    ctx.with_resource(showing_logs(log_level(verbose, quiet)))
    # OpenMP threads that spin while waiting take cores from the environments. Torch reads this when imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def log_level(verbose: bool, quiet: bool) -> int:
    """Return the log level from the options, or from AGENTRL_LOG_LEVEL."""
    if verbose and quiet:
        raise ConfigError("-v and -q contradict each other; give one of them")
    if verbose or quiet:
        return logging.DEBUG if verbose else logging.WARNING
    named = os.environ.get("AGENTRL_LOG_LEVEL") or "info"
    if named.lower() not in _LEVELS:
        raise ConfigError(f"AGENTRL_LOG_LEVEL is {named!r}, wanted one of {', '.join(_LEVELS)}")
    return _LEVELS[named.lower()]


@contextmanager
def showing_logs(level: int) -> Iterator[None]:
    """Show log records during a command: agentrl's from `level` up, and warnings of other packages."""
    ours, screen = logging.getLogger("agentrl"), _StderrHandler()
    before = ours.level
    ours.setLevel(level)
    logging.getLogger().addHandler(screen)
    try:
        with warnings.catch_warnings():
            if level == logging.DEBUG:
                warnings.simplefilter("default")  # includes DeprecationWarning
            yield
    finally:
        ours.setLevel(before)
        logging.getLogger().removeHandler(screen)


class _StderrHandler(logging.Handler):
    """Log handler for the current `sys.stderr`, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        echo(f"{record.levelname.lower()}: {record.name}: {record.getMessage()}", err=True)
