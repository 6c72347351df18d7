"""The command that compares stored scores: `agentrl compare`."""

from pathlib import Path
from typing import Annotated

import typer

from agentrl.commands.arguments import Imports
from agentrl.commands.screen import show_findings
from agentrl.plugins import load_imports
from agentrl.terminal import echo


def compare(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Runs, and folders that `agentrl evaluate --output` wrote. The first is the baseline.",
        ),
    ],
    greedy: Annotated[
        bool | None,
        typer.Option(
            "--greedy/--sampled",
            help="Which scores of runs; default: those of the evaluations beside them, else sampled.",
        ),
    ] = None,
    varying: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="What is meant to differ, such as prompt.text. Repeatable."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a page with the figure of the differences."),
    ] = None,
    imports: Imports = None,
) -> None:
    """Compare policies on the same tasks: paired differences with 95 % intervals, and McNemar's exact test.

    Plays nothing: it reads what runs and evaluations have stored. Executes no code of a run.

    - `agentrl compare runs/A runs/B`
    - `agentrl compare scores/base scores/trained --html comparison.html`
    - `agentrl compare runs/A runs/B --greedy --varying policy.model --json comparison.json`
    """
    import json

    from agentrl.evaluation.comparison import compare as measure
    from agentrl.files import write_atomic

    load_imports(imports or ())
    decoding = None if greedy is None else "greedy" if greedy else "sampled"
    found = measure(*folders, decoding=decoding, varying=varying or ())
    for table in found.tables:
        show_findings(table)
    for line in found.notes:
        echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(found.to_dict(), indent=1, allow_nan=False))
    if markdown is not None:
        write_atomic(markdown, found.to_markdown())
    if html is not None:
        write_atomic(html, found.to_html())
    if written := [str(file) for file in (json_file, markdown, html) if file is not None]:
        echo(f"written: {', '.join(written)}")
