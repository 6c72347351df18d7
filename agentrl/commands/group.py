"""The group of commands: it turns expected errors into one message and an exit code."""

import errno
import shlex
import traceback
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import typer
from typer.core import TyperGroup

from agentrl.errors import AgentRLError
from agentrl.plugins import shell_quoted, withheld_hint, withheld_imports
from agentrl.terminal import echo, plain_warnings


class ExitCode(IntEnum):
    """Exit codes of the command, explained in docs/errors.md."""

    DONE = 0
    MISSING = 1
    REFUSED = 2
    INTERRUPTED = 130  # as a shell reports Ctrl-C


_GLOBAL_OPTIONS = {"--debug", "-v", "--verbose", "-q", "--quiet"}  # accepted after the subcommand too


class CommandGroup(TyperGroup):
    """Command group that turns expected errors into one message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move global options to the front, so that they may follow the subcommand."""
        ctx.meta["agentrl.arguments"] = list(args)
        end = args.index("--") if "--" in args else len(args)
        first = [each for each in args[:end] if each in _GLOBAL_OPTIONS]
        rest = [each for each in args[:end] if each not in _GLOBAL_OPTIONS]
        return super().parse_args(ctx, [*first, *rest, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Run the command and report its errors."""
        try:
            with plain_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            echo(f"\n{str(interrupt) or 'interrupted'}", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from interrupt
        except BrokenPipeError:
            raise
        except (AgentRLError, OSError) as error:
            if ctx.params["debug"]:
                echo(traceback.format_exc(), err=True)
            echo("error: ", err=True, nl=False, style="bold red")
            echo(str(error) if isinstance(error, AgentRLError) else _describe_os_error(error), err=True)
            if (hint := withheld_hint()) and hint in str(error):
                echo(f"full command: {_with_imports(ctx.meta['agentrl.arguments'])}", err=True)
            raise typer.Exit(ExitCode.REFUSED) from error


def _with_imports(arguments: Sequence[str]) -> str:
    """Return the command line with an `--import` option for each withheld import."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [f"--import {shell_quoted(name)}" for name in withheld_imports()]
    return " ".join(
        ["agentrl", *map(shlex.quote, arguments[:end]), *options, *map(shlex.quote, arguments[end:])]
    )


def _describe_os_error(error: OSError) -> str:
    path = str(error.filename or "a file").removesuffix(".partial")
    message = f"{path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{message}. Existing files are intact: free some space, then agentrl train --resume RUN"
    return message
