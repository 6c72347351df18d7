"""The `agentrl` command. Each command imports what it needs, so that help and listings are instant."""

import errno
import inspect
import os
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from agentrl.errors import AgentRLError, ConfigError
from agentrl.terminal import echo, plain_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from agentrl.data.trajectory import Episode
    from agentrl.rollout.settings import Placement


class _Commands(TyperGroup):
    """Ends every foreseen failure with one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with plain_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            echo(f"\n{str(interrupt) or 'interrupted'}", err=True)
            raise typer.Exit(130) from interrupt  # as a shell reports it
        except BrokenPipeError:
            raise
        except (AgentRLError, OSError) as error:
            if ctx.params["debug"]:
                echo(traceback.format_exc(), err=True)
            echo("error: ", err=True, nl=False, style="bold red")
            echo(str(error) if isinstance(error, AgentRLError) else _file_trouble(error), err=True)
            raise typer.Exit(2) from error


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
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, then changes to it.", show_default=False
    ),
]


@app.callback()
def agentrl(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="AGENTRL_DEBUG", help="Show an error's traceback.")
    ] = False,
) -> None:
    """LLM agents that learn multi-turn text tasks by reinforcement learning.

    `agentrl train` trains the default agent on household games in a few minutes on a CPU.
    Each command explains itself: `agentrl train --help`.
    """
    # OpenMP threads that spin while they wait take whole cores from the environments; read when torch loads.
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
        raise ConfigError(f"a resumed run has its own configuration: leave out {path}")
    run = resume_run(resume, *overrides) if resume is not None else train_run(load_config(path, *overrides))
    echo(f"run:    {run.folder}")
    echo(f"report: {run.folder / 'report.html'}")


@app.command()
def evaluate(
    policy: Annotated[
        str,
        typer.Option(metavar="RUN|FOLDER|random|expert", help="A run, a Hugging Face folder, or a script."),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The environment's own arguments.", show_default=False),
    ] = None,
    env: Annotated[str | None, typer.Option(metavar="ID", help="Environment; a run brings its own.")] = None,
    panel: Annotated[Path | None, typer.Option(metavar="FILE", help="Panel, not a split.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to take tasks from.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Number of tasks, from the first.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Plays of each task.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the environments and of the policy's draws.")] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy/--sampled", help="Take the first choice, or draw.")
    ] = False,
    placement: Annotated[
        str | None,
        typer.Option(metavar="auto|inline|thread|process", help="Where environments live; else as trained."),
    ] = None,
    interpreter: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="Of the environments; one that a run names is not started."),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the scores as JSON too.")] = None,
) -> None:
    """Measure a policy on a fixed panel of tasks, with 95 % intervals.

    - `agentrl evaluate --policy runs/NAME --greedy`
    - `agentrl evaluate --policy random --env agentrl/ALFWorld-v0 --split valid_seen --tasks 99 --repeats 4`
    - `agentrl evaluate --policy expert --env agentrl/MathTools-v0 level=2`
    """
    import json

    from agentrl.config import merge
    from agentrl.run.evaluate import evaluate as measure
    from agentrl.run.folder import write_atomic
    from agentrl.run.report import results_table

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    with _Count("evaluating") as count:
        result = measure(
            policy,
            panel,
            env=env,
            split=split,
            tasks=tasks,
            env_kwargs=merge({}, arguments) if arguments else None,
            repeats=repeats,
            seed=seed,
            temperature=0.0 if greedy else 1.0,
            placement=cast("Placement | None", placement),
            interpreter=interpreter,
            on_episode=count,
        )
    summary = {"policies": {policy: {"greedy" if greedy else "sampled": result.to_dict()}}}
    _console().print(results_table(summary))
    ended = ", ".join(f"{times} x {reason}" for reason, times in result.stop_reasons.items())
    echo(f"ended: {ended}")
    for reason, times in result.aborted_reasons.items():
        echo(f"aborted {times} x {reason}")
    if result.retried:
        echo(f"played again after a failure: {result.retried}")
    echo(f"{result.steps_per_second:,.0f} steps/s")
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
    greedy: Annotated[
        bool, typer.Option("--greedy/--sampled", help="Take the first choice, or draw.")
    ] = False,
) -> None:
    """Play one episode yourself, or read one that a policy plays.

    - `agentrl play agentrl/ALFWorld-v0`
    - `agentrl play agentrl/ALFWorld-v0 --policy expert --seed 3 max_steps=30`
    - `agentrl play agentrl/ALFWorld-v0 --policy runs/NAME --greedy`
    """
    from agentrl.config import merge
    from agentrl.run.watch import watch

    episode = watch(
        _console(),
        env,
        policy,
        kwargs=merge({}, arguments or []),
        task=task,
        split=split,
        seed=seed,
        temperature=0.0 if greedy else 1.0,
    )
    if episode.stop.aborted:
        raise AgentRLError(f"the episode was aborted ({episode.stop.value}): {episode.error}")


@app.command()
def envs() -> None:
    """List the environments that are installed."""
    import gymnasium

    from agentrl.env.registry import broken_plugins, env_ids

    for name in env_ids():
        echo(f"{name}  ({gymnasium.spec(name).entry_point})")
    for plugin, reason in broken_plugins().items():
        echo(f"{plugin} is broken: {reason}", err=True)


@app.command()
def algorithms(name: Annotated[str | None, typer.Argument(help="describe this one")] = None) -> None:
    """List the algorithms, the values of `algorithm.name`, or describe one with its keys and defaults.

    - `agentrl algorithms epo`
    """
    from agentrl.algorithms import recipe
    from agentrl.config import to_yaml

    if name is not None:
        echo(inspect.getdoc(recipe.recipe_class(name)))
        defaults = recipe.recipe_tree(recipe.build_recipe(name))
        echo(f"\nDefaults:\n\n{to_yaml({'algorithm': defaults})}")
        return
    names = recipe.recipe_names()
    for known in names:
        echo(f"{known:{max(map(len, names))}}  {recipe.describe_recipe(known)}")


@app.command()
def config(arguments: Overrides = None) -> None:
    """Print a configuration with every default filled in.

    - `agentrl config configs/quickstart.yaml seed=1 > mine.yaml`
    """
    from agentrl.config import to_yaml
    from agentrl.run.settings import config_tree, load_config

    path, overrides = _split(arguments)
    echo(to_yaml(config_tree(load_config(path, *overrides))), nl=False)


@app.command()
def plan(
    arguments: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="That torchrun will start, on all machines.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that it will start them on.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a run will take and what is missing, before anything starts; exit code 1 when something is.

    - `agentrl plan configs/quickstart.yaml rollout.max_active=128`
    - `agentrl plan configs/cluster.yaml --nodes 2 --json`
    """
    import json

    from agentrl.run.plan import plan as find_out
    from agentrl.run.plan import plan_table
    from agentrl.run.settings import load_config

    path, overrides = _split(arguments)
    found = find_out(load_config(path, *overrides), processes=processes, nodes=nodes)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=1))
    else:
        _console().print(plan_table(found))
        for line in found.missing or ("nothing is missing",):
            echo(f"missing: {line}" if found.missing else line, style="red" if found.missing else "green")
    if found.missing:
        raise typer.Exit(1)


@app.command("check-env")
def check_env(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]... [KEY=VALUE]...",
            help="Environments to be checked, and their own arguments.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Check all that are registered; skip those that lack an extra.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the episodes that are played.")] = 0,
) -> None:
    """Check environments against the contract; exit code 1 when one breaks it.

    - `agentrl check-env agentrl/ALFWorld-v0 max_steps=10`
    - `agentrl check-env --all`
    """
    from agentrl.config import merge
    from agentrl.env.registry import broken_plugins, env_ids

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
        raise typer.Exit(1)


@app.command("new-env")
def new_env(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Such as GuessNumber or my_lab/GuessNumber-v0.")
    ],
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where to; made if need be.")] = Path(),
) -> None:
    """Write an environment of your own: one short file that works, its test and its entry point.

    - `agentrl new-env GuessNumber`
    - `agentrl new-env my_lab/GuessNumber-v0 --folder guess_number`
    """
    from agentrl.env.new_env import write_new_env

    made = write_new_env(name, folder)
    for path, what in made.files.items():
        echo(f"{path}: {what}")
    if made.to_add is not None:
        echo(f"{folder / 'pyproject.toml'} stays as it is; add to it:\n\n{made.to_add}")
    echo(f"\nNext:\n  python -m pip install -e {folder}\n  agentrl check-env {made.names.id}")
    echo(f"  agentrl train env.id={made.names.id} evaluation.split=test evaluation.tasks=30")


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or name.")]) -> None:
    """Write a run's report.html anew, also of a run that is not finished."""
    from agentrl.run.folder import open_run
    from agentrl.run.report import write_report

    echo(write_report(open_run(run).folder))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` are those of the shell unless given. Ends in SystemExit."""
    app(arguments, prog_name="agentrl")


def _check_env(env: str, kwargs: dict[str, Any], seed: int, *, tolerant: bool) -> tuple[str, bool]:
    """Print what was found of an environment; say in a line what came of it, and whether that is all right.

    A tolerant check of one that cannot be made is told in the line; else it raises.
    """
    from time import perf_counter

    from agentrl.env.contract import check_text_env
    from agentrl.env.registry import make
    from agentrl.errors import MissingDependencyError

    begun = perf_counter()
    try:
        found = check_text_env(partial(make, env, **kwargs), seed=seed)
    except AgentRLError as error:
        if not tolerant:
            raise
        if isinstance(error, MissingDependencyError) and _lacks_another_package(error, env):
            return f"{env} skipped: {error}", True
        return f"{env} cannot be made: {error}", False
    _console().print(found)
    return f"{found.summary()} ({perf_counter() - begun:.1f} s)", found.passed


def _lacks_another_package(error: ImportError, env: str) -> bool:
    """Whether it is only not installed; else its own package, or what it takes from another, is broken."""
    import gymnasium

    cause = error.__cause__
    if not isinstance(cause, ImportError):
        return True
    own = str(gymnasium.spec(env).entry_point).partition(":")[0].partition(".")[0]
    return isinstance(cause, ModuleNotFoundError) and (cause.name or own).partition(".")[0] != own


def _split(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """CONFIG, if the first argument is one, and the overrides."""
    given = list(arguments or ())
    if given and "=" not in given[0]:
        return given[0], given[1:]
    return None, given


def _file_trouble(error: OSError) -> str:
    path = str(error.filename or "a file").removesuffix(".partial")
    message = f"{path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{message}. What was written before is whole: free some space, then agentrl train --resume RUN"
        )
    return message


def _console() -> "Console":
    from agentrl.terminal import Terminal

    return Terminal()


class _Count:
    """Counts episodes on a terminal's last line while an evaluation plays."""

    def __init__(self, what: str) -> None:
        from agentrl.terminal import Terminal

        self._what = what
        self._status = Terminal(stderr=True).status(what)
        self._episodes = self._successes = 0

    def __enter__(self) -> "_Count":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, episode: "Episode") -> None:
        self._episodes += 1
        self._successes += episode.success
        self._status.update(f"{self._what}: {self._episodes} episodes, {self._successes} successes")
