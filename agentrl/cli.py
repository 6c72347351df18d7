"""The `agentrl` command. Each subcommand imports what it needs, so that help and listings stay fast."""

from collections.abc import Callable, Sequence

import typer

from agentrl.commands.algorithms import algorithms, new_algorithm
from agentrl.commands.comparing import compare
from agentrl.commands.configuration import config, plan, prompt
from agentrl.commands.environments import check_env, envs, new_env
from agentrl.commands.evaluating import evaluate
from agentrl.commands.global_options import every_command
from agentrl.commands.group import CommandGroup, ExitCode
from agentrl.commands.playing import play
from agentrl.commands.results import export, report
from agentrl.commands.training import train

__all__ = ["ExitCode", "app", "main"]

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(
    epilog="Exit codes: 0 done; 1 a problem was found (plan, check-env); 2 refused, with the reason; "
    "130 interrupted. See docs/errors.md for what each error means and what to do."
)(every_command)
# In the order of the help.
_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "play": play,
    "envs": envs,
    "algorithms": algorithms,
    "config": config,
    "plan": plan,
    "prompt": prompt,
    "check-env": check_env,
    "new-env": new_env,
    "new-algorithm": new_algorithm,
    "report": report,
    "export": export,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and raise SystemExit.

    Args:
        arguments: The arguments; None takes them from the shell.
    """
    app(arguments, prog_name="agentrl")
