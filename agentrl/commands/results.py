"""The commands about what a run has left: `agentrl report` and `export`."""

from pathlib import Path
from typing import Annotated

import typer

from agentrl.commands.arguments import Imports
from agentrl.commands.screen import show_findings
from agentrl.errors import ConfigError
from agentrl.plugins import load_imports
from agentrl.terminal import echo


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or name of a run.")],
    template_collapse: Annotated[
        bool,
        typer.Option(
            "--template-collapse",
            help="First measure the mutual information of prompts and replies, for each checkpoint.",
        ),
    ] = False,
    expert_entropy: Annotated[
        bool,
        typer.Option(
            "--expert-entropy",
            help="First measure the entropy of the expert's last action along the turns of the episodes.",
        ),
    ] = False,
    sample: Annotated[
        int, typer.Option(min=2, help="Of these two: prompts with their replies, or episodes.")
    ] = 64,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="STEP|NAME",
            help="Of these two: one checkpoint; default: every one, or the trained policy.",
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Rewrite the report.html of a run, finished or not. Executes no code of the run.

    - `agentrl report runs/NAME`
    - `agentrl report runs/NAME --template-collapse --expert-entropy`
    """
    from agentrl.evaluation.report import write_report
    from agentrl.run.folder import find_run

    load_imports(imports or ())
    folder = find_run(run)
    if checkpoint is not None and not (template_collapse or expert_entropy):
        raise ConfigError("--checkpoint: wanted with --template-collapse or --expert-entropy only")
    if template_collapse:
        from agentrl.evaluation.diagnostics.tables import template_collapse_findings
        from agentrl.evaluation.diagnostics.template_collapse import measure_template_collapse

        collapse = measure_template_collapse(folder, pairs=sample, checkpoint=checkpoint)
        show_findings(template_collapse_findings(collapse))
    if expert_entropy:
        from agentrl.evaluation.diagnostics.expert_entropy import measure_expert_entropy
        from agentrl.evaluation.diagnostics.tables import expert_entropy_findings

        entropy = measure_expert_entropy(folder, episodes=sample, checkpoint=checkpoint)
        show_findings(expert_entropy_findings(entropy))
    echo(write_report(folder))


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or name of a run, finished or not.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER|FILE", help="New folder, or file of messages.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="model|messages",
            help="The policy, or the stored episodes as chat messages.",
        ),
    ] = "model",
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge LoRA adapters into whole weights; else a peft folder.")
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="STEP|NAME", help="Checkpoint; default: the trained policy, else the newest checkpoint."
        ),
    ] = None,
    successes: Annotated[
        bool, typer.Option("--successes", help="Of messages: only of episodes that succeeded.")
    ] = False,
    episodes: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help="Of messages: files of RUN/episodes, without suffix; default: train-*."
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Write the policy of a run as a Hugging Face folder, or its episodes. Executes no code of the run.

    Weights are float32. Messages are what `datasets.load_dataset("json", data_files=FILE)` and
    `warm_start.data=FILE` read.

    - `agentrl export runs/NAME --to policy`
    - `agentrl export runs/NAME --merge --checkpoint 100 --to merged`
    - `agentrl export runs/NAME --format messages --successes --to solved.jsonl`
    """
    load_imports(imports or ())
    if format == "messages":
        _check_unused("--format model", merge=merge, checkpoint=checkpoint)
        from agentrl.run.message_export import export_messages

        done = export_messages(run, to, successes=successes, pattern=episodes or "train-*")
        echo(f"{to}: {done.rows:,} conversations of {done.written:,} episodes, of {done.episodes:,} stored")
        return
    if format != "model":
        raise ConfigError(f"--format is {format!r}, wanted model or messages")
    _check_unused("--format messages", successes=successes, episodes=episodes)
    from agentrl.run.weights import export as write_policy

    saved = write_policy(run, to, merge=merge, checkpoint=checkpoint)
    if saved.checkpoint is not None and not saved.asked:
        echo(saved.describe())
    whole = saved.adapter is None or merge
    echo(f"{to}: {'the whole weights' if whole else 'adapters for peft'} of {saved.path}")


def _check_unused(wanted: str, **options: object) -> None:
    """Refuse options that only another format reads."""
    if given := [f"--{name}" for name, value in options.items() if value]:
        raise ConfigError(f"{', '.join(given)}: wanted with {wanted} only")
