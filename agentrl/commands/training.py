"""The command that trains: `agentrl train`."""

from typing import Annotated

import typer

from agentrl.commands.arguments import Imports, Overrides, split_config
from agentrl.errors import ConfigError
from agentrl.plugins import load_imports
from agentrl.terminal import echo


def train(
    arguments: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run, given by folder or name.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Train a policy and write a run folder with a report.

    Without CONFIG, train the quickstart.

    - `agentrl train`
    - `agentrl train configs/quickstart.yaml algorithm.name=dr_grpo learner.learning_rate=3e-4 seed=1`
    - `agentrl train env.id=example/HotCold-v0 --import hotcold.py`
    - `agentrl train --resume runs/NAME`
    - `agentrl train --resume runs/NAME trainer.steps=480 trainer.schedule_steps=240`
    """
    from agentrl.run.settings import load_config
    from agentrl.training.launch import resume as resume_run
    from agentrl.training.launch import train as train_run

    path, overrides = split_config(arguments)
    if resume is not None and path is not None:
        raise ConfigError(f"--resume uses the configuration of the run: leave out {path}")
    imported = load_imports(imports or ())
    if resume is not None:
        run = resume_run(resume, *overrides)
    else:
        run = train_run(load_config(path, *overrides, imports=imported))
    echo(f"run:    {run.folder}")
    echo(f"report: {run.folder / 'report.html'}")
