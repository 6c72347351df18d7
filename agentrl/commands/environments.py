"""The commands about environments: `agentrl envs`, `check-env` and `new-env`."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from agentrl.commands.arguments import Imports, known_env_ids
from agentrl.commands.group import ExitCode
from agentrl.commands.screen import console, echo_written
from agentrl.errors import AgentRLError, ConfigError
from agentrl.plugins import load_imports
from agentrl.terminal import echo


def envs(imports: Imports = None) -> None:
    """List the environments that are installed or imported."""
    import gymnasium

    from agentrl.env.registry import broken_plugins, env_ids

    load_imports(imports or ())
    for name in env_ids():
        echo(f"{name}  ({gymnasium.spec(name).entry_point})")
    for plugin, reason in broken_plugins().items():
        echo(f"{plugin} is broken: {reason}", err=True)


def check_env(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]... [KEY=VALUE]...",
            help="Environments to check, and arguments for them.",
            show_default=False,
            autocompletion=known_env_ids,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Check all registered environments; skip those with a missing extra."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the episodes.")] = 0,
    imports: Imports = None,
) -> None:
    """Check environments against the contract. Exits with 1 if one breaks it.

    - `agentrl check-env agentrl/ALFWorld-v0 max_steps=10`
    - `agentrl check-env --all`
    """
    from agentrl.config import merge
    from agentrl.env.registry import broken_plugins, env_ids

    load_imports(imports or ())
    ids = [argument for argument in arguments or () if "=" not in argument]
    kwargs = merge({}, [argument for argument in arguments or () if "=" in argument])
    if every == bool(ids) or (every and kwargs):
        raise ConfigError("check-env wants either ids, with KEY=VALUE for their arguments, or --all alone")
    outcomes = [_check_env(env, kwargs, seed, tolerant=every) for env in (env_ids() if every else ids)]
    if every:
        outcomes += [(f"{plugin} is broken: {why}", False) for plugin, why in broken_plugins().items()]
    if every or len(outcomes) > 1:
        for line, _ in outcomes:
            echo(line)
    if not all(kept for _, kept in outcomes):
        raise typer.Exit(ExitCode.MISSING)


def _check_env(env: str, kwargs: dict[str, Any], seed: int, *, tolerant: bool) -> tuple[str, bool]:
    """Print the contract report of an environment, and return a summary line and whether it passed.

    If the environment cannot be made, a tolerant check says so in the summary; otherwise it raises.
    """
    from time import perf_counter

    from agentrl.env.contract import check_text_env
    from agentrl.env.registry import make
    from agentrl.errors import MissingDependencyError

    start = perf_counter()
    try:
        found = check_text_env(partial(make, env, **kwargs), seed=seed)
    except AgentRLError as error:
        if not tolerant:
            raise
        if isinstance(error, MissingDependencyError) and _lacks_another_package(error, env):
            return f"{env} skipped: {error}", True
        return f"{env} cannot be made: {error}", False
    console().print(found)
    return f"{found.summary()} ({perf_counter() - start:.1f} s)", found.passed


def _lacks_another_package(error: ImportError, env: str) -> bool:
    """Return whether another package is not installed, rather than the environment's own being broken."""
    import gymnasium

    cause = error.__cause__
    if not isinstance(cause, ImportError):
        return True
    own = str(gymnasium.spec(env).entry_point).partition(":")[0].partition(".")[0]
    return isinstance(cause, ModuleNotFoundError) and (cause.name or own).partition(".")[0] != own


def new_env(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name, such as GuessNumber or my_lab/GuessNumber-v0.")
    ],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write to; created if missing.")
    ] = Path(),
) -> None:
    """Create a new environment: a short working example, its test and its entry point.

    - `agentrl new-env GuessNumber`
    - `agentrl new-env my_lab/GuessNumber-v0 --folder guess_number`
    """
    from agentrl.env.new_env import write_new_env

    made = write_new_env(name, folder)
    echo_written(made.files, made.to_add, folder)
    given = f"--import {shlex.quote(str(folder / f'{made.names.module}.py'))}"
    echo(f"\nNext:\n  agentrl check-env {made.names.id} {given}")
    echo(f"  agentrl train env.id={made.names.id} evaluation.split=test evaluation.tasks=30 {given}")
    echo(f"\nOnce installed, it needs no --import:\n  python -m pip install -e {shlex.quote(str(folder))}")
