"""The commands about algorithms: `agentrl algorithms` and `new-algorithm`."""

import shlex
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from agentrl.commands.arguments import Imports, recipe_names
from agentrl.commands.screen import echo_written
from agentrl.plugins import load_imports
from agentrl.terminal import echo


def algorithms(
    name: Annotated[
        str | None, typer.Argument(help="Algorithm to describe.", autocompletion=recipe_names)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    imports: Imports = None,
) -> None:
    """List the algorithms (values of `algorithm.name`), or describe one with its keys and defaults.

    - `agentrl algorithms epo`
    """
    import json

    from agentrl.algorithms import catalogue

    load_imports(imports or ())
    if name is not None:
        known = catalogue.describe(name)
        echo(json.dumps(known, indent=1) if as_json else catalogue.as_text(known))
        return
    methods = catalogue.list_methods(imported=bool(imports))
    if as_json:
        echo(json.dumps([asdict(method) for method in methods], indent=1))
        return
    width = max(len(method.name) for method in methods)
    for kind, group in groupby(methods, key=lambda method: method.kind):
        echo(f"\n{kind or 'other'}", style="bold cyan")
        for method in group:
            doubt = " (reconstruction)" if method.confidence == "reconstruction" else ""
            echo(f"  {method.name:{width}}  {method.summary}{doubt}")


def new_algorithm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name in configurations, such as my_method.")],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write to; created if missing.")
    ] = Path(),
) -> None:
    """Create a new algorithm: a short working method over another one, its test and its entry point.

    - `agentrl new-algorithm my_method`
    - `agentrl new-algorithm my_method --folder my_method`
    """
    from agentrl.algorithms.new_algorithm import write_new_algorithm

    made = write_new_algorithm(name, folder)
    echo_written(made.files, made.to_add, folder)
    given = f"--import {shlex.quote(str(folder / f'{made.names.module}.py'))}"
    echo(f"\nNext:\n  python -m pytest {shlex.quote(str(folder / f'test_{made.names.module}.py'))}")
    echo(f"  agentrl algorithms {name} {given}")
    echo(f"  agentrl train configs/quickstart.yaml algorithm.name={name} {given}")
    echo(f"\nOnce installed, it needs no --import:\n  python -m pip install -e {shlex.quote(str(folder))}")
