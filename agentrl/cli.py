"""The `agentrl` command. What is heavy is imported by the command that needs it, so that help and listings are instant."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from agentrl.errors import AgentRLError

if TYPE_CHECKING:
    from rich.console import Console

    from agentrl.data.trajectory import Episode
    from agentrl.rollout.play import ActionRequest, Reply, Stop
    from agentrl.rollout.players import Player


class _Commands(TyperGroup):
    """Ends every foreseen failure with one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AgentRLError as error:
            raise _failure(str(error)) from error
        except KeyboardInterrupt as interrupt:
            typer.echo(f"\n{str(interrupt) or 'interrupted'}", err=True)
            raise typer.Exit(128 + 2) from interrupt  # as a shell reports SIGINT
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _failure(_file_trouble(error)) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, then changes to it.", show_default=False),
]


@app.callback()
def agentrl(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="AGENTRL_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """LLM agents that learn multi-turn text tasks by reinforcement learning.

    `agentrl train` trains the default agent on household games in a few minutes on a CPU.
    Each command explains itself: `agentrl train --help`.
    """
    os.environ["AGENTRL_DEBUG"] = "1" if debug else ""
    # OpenMP threads that wait in a spin loop take whole cores from the environments; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


@app.command()
def train(
    arguments: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue an interrupted run: its folder or name.")
    ] = None,
) -> None:
    """Train a policy and write a run's folder, with its report.

    Without CONFIG, the defaults: the quickstart.

    - `agentrl train`
    - `agentrl train configs/quickstart.yaml algorithm.name=dr_grpo learner.learning_rate=3e-4 seed=1`
    - `agentrl train --resume runs/NAME`
    """
    from agentrl.run.settings import load_config
    from agentrl.run.trainer import resume as resume_run
    from agentrl.run.trainer import train as train_run

    path, overrides = _split(arguments)
    if resume is not None and path is not None:
        raise _failure(f"a resumed run has its own configuration: leave out {path}")
    run = resume_run(resume, *overrides) if resume is not None else train_run(load_config(path, *overrides))
    typer.echo(f"run:    {run.folder}")
    typer.echo(f"report: {run.folder / 'report.html'}")


@app.command()
def evaluate(
    policy: Annotated[
        str, typer.Option(metavar="RUN|FOLDER|random|expert", help="A run, a Hugging Face folder, or a script.")
    ],
    env: Annotated[str | None, typer.Option(metavar="ID", help="Environment; a run brings its own.")] = None,
    panel: Annotated[Path | None, typer.Option(metavar="FILE", help="Panel of tasks, instead of the next two.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to take tasks from.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Number of tasks, from the first.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Plays of each task.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the environments and of the policy's draws.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy/--sampled", help="Always take the first choice, or draw.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the scores as JSON too.")] = None,
) -> None:
    """Measure a policy on a fixed panel of tasks, with 95 % intervals.

    - `agentrl evaluate --policy runs/NAME --greedy`
    - `agentrl evaluate --policy random --env agentrl/ALFWorld-v0 --split valid_unseen --tasks 100 --repeats 4`
    """
    import json

    from agentrl.run.evaluate import evaluate as measure
    from agentrl.run.folder import write_atomic
    from agentrl.run.report import results_table

    with _Count("evaluating") as count:
        result = measure(
            policy,
            panel,
            env=env,
            split=split,
            tasks=tasks,
            repeats=repeats,
            seed=seed,
            temperature=0.0 if greedy else 1.0,
            on_episode=count,
        )
    summary = {"policies": {policy: {"greedy" if greedy else "sampled": result.to_dict()}}}
    _console().print(results_table(summary))
    for reason, times in result.aborted_reasons.items():
        typer.echo(f"aborted {times} x {reason}")
    if output is not None:
        write_atomic(output, json.dumps(result.to_dict() | {"policy": policy, "seed": seed}, indent=1))


@app.command()
def play(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Environment's id.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The environment's own arguments.", show_default=False),
    ] = None,
    policy: Annotated[str, typer.Option(metavar="human|random|expert|RUN", help="Who plays.")] = "human",
    task: Annotated[str | None, typer.Option(metavar="ID", help="A task; else the seed takes one.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to take the task from.")] = None,
    seed: Annotated[int, typer.Option(help="Of the environment and of the policy's draws.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy/--sampled", help="Always take the first choice, or draw.")] = False,
) -> None:
    """Play one episode yourself, or read one that a policy plays.

    - `agentrl play agentrl/ALFWorld-v0`
    - `agentrl play agentrl/ALFWorld-v0 --policy expert --seed 3 max_steps=30`
    - `agentrl play agentrl/ALFWorld-v0 --policy runs/NAME --greedy`
    """
    from agentrl.rollout.play import EpisodeSpec
    from agentrl.run.theatre import Theatre, perform

    theatre = Theatre(_console())
    episode = perform(
        theatre, env, policy, kwargs=_tree(arguments), task=task, split=split, seed=seed, temperature=0.0 if greedy else 1.0
    )
