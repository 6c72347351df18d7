"""The `agentrl` command. Each subcommand imports what it needs, so that help and listings stay fast."""

import errno
import logging
import os
import shlex
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum
from functools import partial
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

import agentrl
from agentrl.errors import AgentRLError, ConfigError
from agentrl.plugins import load_imports, shell_quoted, withheld_hint, withheld_imports
from agentrl.terminal import echo, plain_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from agentrl.data.trajectory import Episode
    from agentrl.evaluation.statistics import TaskMean
    from agentrl.rollout.settings import Placement


class ExitCode(IntEnum):
    """Exit codes of the command, explained in docs/errors.md."""

    DONE = 0
    MISSING = 1
    REFUSED = 2
    INTERRUPTED = 130  # as a shell reports Ctrl-C


_GLOBAL_OPTIONS = {"--debug", "-v", "--verbose", "-q", "--quiet"}  # accepted after the subcommand too


class _Commands(TyperGroup):
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


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete_configuration(incomplete: str) -> list[str]:
    """Complete config files, and the values of `algorithm.name` and `env.id`."""
    words = os.environ.get("COMP_WORDS", "").split()  # bash splits words at "="
    key, equals, prefix = incomplete.rpartition("=")
    for named, known in (("algorithm.name", _recipe_names), ("env.id", _env_ids)):
        if key == named:
            return [f"{key}={name}" for name in known(prefix)]
        if named in words[-3:] and words[-1] in ("=", incomplete):
            return known(incomplete.removeprefix("="))
    if equals:
        return []
    from agentrl.run.config_files import shipped_configs

    below = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    near = [str(path) + "/" * path.is_dir() for path in sorted(below.glob("*"))] if below.is_dir() else []
    files = [path for path in near if path.endswith((".yaml", ".yml", "/"))]
    names = [*files, *shipped_configs(), "algorithm.name=", "env.id=", "seed="]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _recipe_names(incomplete: str) -> list[str]:
    """Return the names of the installed algorithms from their entry points, without importing them."""
    found = entry_points(group="agentrl.algorithms")
    return sorted(each.name for each in found if each.name.startswith(incomplete))


def _env_ids(incomplete: str) -> list[str]:
    from agentrl.env.registry import env_ids

    return [name for name in env_ids() if name.startswith(incomplete)]


def _suites(incomplete: str) -> list[str]:
    from agentrl.evaluation.suites import shipped_suites

    return [name for name in shipped_suites() if name.startswith(incomplete)]


def _policies(incomplete: str) -> list[str]:
    """Return the scripted policies and the runs below `runs/`."""
    runs = [str(path.parent) for path in sorted(Path("runs").glob("*/config.yaml"))]
    return [name for name in ("human", "random", "expert", *runs) if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, and overrides such as seed=1.",
        show_default=False,
        autocompletion=_complete_configuration,
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE|MODULE",
        help="Load a Python file or module with environments or algorithms. Repeatable.",
        show_default=False,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"agentrl {agentrl.__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done; 1 a problem was found (plan, check-env); 2 refused, with the reason; "
    "130 interrupted. See docs/errors.md for what each error means and what to do."
)
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
    ctx.with_resource(_logging(_level(verbose, quiet)))
    # OpenMP threads that spin while waiting take cores from the environments. Torch reads this when imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def _level(verbose: bool, quiet: bool) -> int:
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
def _logging(level: int) -> Iterator[None]:
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


@app.command()
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

    path, overrides = _split_config(arguments)
    if resume is not None and path is not None:
        raise ConfigError(f"--resume uses the configuration of the run: leave out {path}")
    imported = load_imports(imports or ())
    if resume is not None:
        run = resume_run(resume, *overrides)
    else:
        run = train_run(load_config(path, *overrides, imports=imported))
    echo(f"run:    {run.folder}")
    echo(f"report: {run.folder / 'report.html'}")


@app.command()
def evaluate(
    policy: Annotated[
        list[str],
        typer.Option(
            metavar="RUN|CHECKPOINT|MODEL|openai:MODEL|random|expert",
            help="A run (if it has not finished, its newest checkpoint), RUN/checkpoints/NAME, a model as "
            "policy.path names one, a model on a chat server, or a scripted policy. Repeatable.",
            autocompletion=_policies,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys as in training (policy.prompt=literature), and the environment's own arguments.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration for a model: its environment, prompts and panel."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID", help="Environment; default: the run's. Repeatable.", autocompletion=_env_ids
        ),
    ] = None,
    panel: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Panel of tasks, instead of a split. Repeatable."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="List of panels: text_games, or a YAML file.", autocompletion=_suites
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to take tasks from.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Number of tasks to play.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Episodes per task.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of environments and sampling.")] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy/--sampled", help="Decode greedily, or sample at temperature 1.")
    ] = False,
    placement: Annotated[
        str | None,
        typer.Option(
            metavar="auto|inline|thread|process", help="Where environments run; default: as in training."
        ),
    ] = None,
    interpreter: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="Interpreter for the environments; a run's own is not trusted."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.json",
            help="Also write the scores: as one JSON file, or to a folder with the episodes, where an "
            "interrupted evaluation goes on.",
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Chat server of openai:MODEL (http://HOST:PORT/v1); default: OPENAI_BASE_URL. The key is "
            "OPENAI_API_KEY.",
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Measure policies on fixed panels of tasks, with 95 % intervals.

    - `agentrl evaluate --policy runs/NAME --greedy`
    - `agentrl evaluate --policy runs/NAME/checkpoints/train-000100`
    - `agentrl evaluate --policy random --env agentrl/ALFWorld-v0 --split valid_seen --tasks 99 --repeats 4`
    - `agentrl evaluate --policy expert --env agentrl/MathTools-v0 level=2`
    - `agentrl evaluate --policy smollm2 --config smollm2_alfworld.yaml policy.prompt=react`
    - `agentrl evaluate --policy random --policy expert --suite text_games --repeats 4 --output FOLDER`
    - `agentrl evaluate --policy openai:MODEL --base-url http://127.0.0.1:8000/v1 --tasks 20`
    """
    from agentrl.config import merge
    from agentrl.evaluation.panel_lists import lists_panels

    load_imports(imports or ())
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    keys, own = _split_keys(arguments or [])
    named = {"split": split, "tasks": tasks, "env_kwargs": merge({}, own) if own else None}
    options: dict[str, Any] = named | {
        "repeats": repeats,
        "seed": seed,
        "temperature": 0.0 if greedy else 1.0,
        "placement": cast("Placement | None", placement),
        "interpreter": interpreter,
        "config": config,
        "overrides": keys,
        "base_url": base_url,
    }
    envs, panels = env or [], panel or []
    several = suite is not None or max(len(policy), len(envs), len(panels)) > 1 or _is_folder(output)
    if not several and not (envs or panels or split or own):
        several = lists_panels(policy[0], config, keys)
    if several:
        _evaluate_several(policy, panels, suite, envs, output, options)
    else:
        _evaluate_one(policy[0], panels, envs, output, options)


def _is_folder(output: Path | None) -> bool:
    """Return whether an output is a folder, and not a file of JSON."""
    return output is not None and not output.is_file() and (output.is_dir() or output.suffix != ".json")


def _evaluate_several(
    policies: Sequence[str],
    panels: Sequence[Path],
    suite: str | None,
    envs: Sequence[str],
    output: Path | None,
    options: dict[str, Any],
) -> None:
    """Evaluate policies on several panels and print one table; exits with 1 if nothing could be played."""
    import json

    from agentrl.evaluation.panels_table import panels_table
    from agentrl.evaluation.suite import evaluate_panels
    from agentrl.files import write_atomic

    folder = output if _is_folder(output) else None
    try:
        with _EpisodeCounter("evaluating") as count:
            found = evaluate_panels(
                policies, panels, suite=suite, envs=envs, output=folder, on_episode=count, **options
            )
    except KeyboardInterrupt as interrupt:
        kept = "" if folder is None else f": {folder} keeps the episodes so far, the same command goes on"
        raise KeyboardInterrupt(f"interrupted{kept}") from interrupt
    echo(found.title)
    _console().print(panels_table(found.scores))
    for line in found.notes:
        echo(line)
    if folder is not None:
        echo(f"results: {folder / 'results.md'}, results.json, episodes")
    elif output is not None:
        write_atomic(output, json.dumps(found.to_dict(), indent=1))
    if not any(score.evaluation for scores in found.scores.values() for score in scores):
        raise typer.Exit(ExitCode.MISSING)


def _evaluate_one(
    policy: str, panels: Sequence[Path], envs: Sequence[str], output: Path | None, options: dict[str, Any]
) -> None:
    """Evaluate a policy on one panel and print its table."""
    import json

    from agentrl.evaluation.evaluate import evaluate as measure
    from agentrl.evaluation.results_table import describe_usage, results_table
    from agentrl.files import write_atomic

    with _EpisodeCounter("evaluating") as count:
        result = measure(
            policy, next(iter(panels), None), env=next(iter(envs), None), on_episode=count, **options
        )
    decoding = "sampled" if options["temperature"] else "greedy"
    summary = {"policies": {policy: {decoding: result.to_dict()}}}
    _console().print(results_table(summary))
    for k, estimate in result.pass_at.items():
        if k > 1:
            echo(
                f"{_describe_rate(f'pass@{k}', estimate)}, {_describe_rate(f'pass^{k}', result.pass_hat[k])}"
            )
    ended = ", ".join(f"{times} x {reason}" for reason, times in result.stop_reasons.items())
    echo(f"ended: {ended}")
    for reason, times in result.aborted_reasons.items():
        echo(f"aborted {times} x {reason}")
    if result.retried:
        echo(f"played again after a failure: {result.retried}")
    if result.checkpoint is not None:
        echo(f"checkpoint: {result.checkpoint}")
    if result.usage is not None:
        echo(describe_usage(result.usage, sum(result.stop_reasons.values())))
    echo(f"{result.steps_per_second:,.0f} steps/s")
    if output is not None:
        write_atomic(
            output, json.dumps(result.to_dict() | {"policy": policy, "seed": options["seed"]}, indent=1)
        )


def _describe_rate(name: str, rate: "TaskMean") -> str:
    low, high = (f"{100 * end:.1f}" for end in rate.interval)
    value = "–" if rate.mean is None else f"{100 * rate.mean:.1f}"
    return f"{name} {value} [{low}, {high}]"


@app.command()
def play(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Environment id.", autocompletion=_env_ids)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The environment's own arguments.", show_default=False),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="human|random|expert|RUN|CHECKPOINT", help="Policy that plays.", autocompletion=_policies
        ),
    ] = "human",
    task: Annotated[str | None, typer.Option(metavar="ID", help="Task; default: drawn by the seed.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to take the task from.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of environment and sampling.")] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy/--sampled", help="Decode greedily, or sample at temperature 1.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Play one episode yourself, or watch a policy play it.

    - `agentrl play agentrl/ALFWorld-v0`
    - `agentrl play agentrl/ALFWorld-v0 --policy expert --seed 3 max_steps=30`
    - `agentrl play agentrl/ALFWorld-v0 --policy runs/NAME --greedy`
    """
    from agentrl.config import merge
    from agentrl.evaluation.watch import watch

    load_imports(imports or ())
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
def envs(imports: Imports = None) -> None:
    """List the environments that are installed or imported."""
    import gymnasium

    from agentrl.env.registry import broken_plugins, env_ids

    load_imports(imports or ())
    for name in env_ids():
        echo(f"{name}  ({gymnasium.spec(name).entry_point})")
    for plugin, reason in broken_plugins().items():
        echo(f"{plugin} is broken: {reason}", err=True)


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(help="Algorithm to describe.", autocompletion=_recipe_names)
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


@app.command()
def config(arguments: Overrides = None, imports: Imports = None) -> None:
    """Print a complete configuration, with defaults filled in and `extends` resolved.

    - `agentrl config configs/quickstart.yaml seed=1 > mine.yaml`
    """
    from agentrl.run.settings import config_yaml, load_config

    path, overrides = _split_config(arguments)
    echo(config_yaml(load_config(path, *overrides, imports=load_imports(imports or ()))), nl=False)


@app.command()
def plan(
    arguments: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that torchrun starts in total.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that torchrun runs on.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    imports: Imports = None,
) -> None:
    """Show what a run needs and what is missing, without starting it. Exits with 1 if anything is missing.

    - `agentrl plan configs/quickstart.yaml rollout.max_active=128`
    - `agentrl plan configs/cluster.yaml --nodes 2 --json`
    """
    import json

    from agentrl.planning.plan import plan as make_plan
    from agentrl.planning.plan import plan_table
    from agentrl.run.settings import load_config

    path, overrides = _split_config(arguments)
    read = load_config(path, *overrides, imports=load_imports(imports or ()))
    found = make_plan(read, processes=processes, nodes=nodes)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=1))
    else:
        _console().print(plan_table(found))
        for line in found.notes:
            echo(f"note: {line}", style="yellow")
        for line in found.missing or ("nothing is missing",):
            echo(f"missing: {line}" if found.missing else line, style="red" if found.missing else "green")
    if found.missing:
        raise typer.Exit(ExitCode.MISSING)


@app.command()
def prompt(
    arguments: Overrides = None,
    turns: Annotated[int, typer.Option(min=1, help="Number of turns to show.")] = 3,
    env: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several environments; default: each of them.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="ID", help="Task; default: the first training task.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    imports: Imports = None,
) -> None:
    """Print exactly what the policy reads in the first turns of an episode, with token counts.

    The environment's expert plays, or chance where there is none; no weights are loaded.

    - `agentrl prompt configs/quickstart.yaml`
    - `agentrl prompt env.id=agentrl/ALFWorld-v0 policy.path=FOLDER policy.prompt=literature --turns 4`
    """
    import json

    from agentrl.planning.prompt_preview import preview_prompts, preview_text
    from agentrl.run.settings import load_config

    path, overrides = _split_config(arguments)
    read = load_config(path, *overrides, imports=load_imports(imports or ()))
    views = list(read.each_alone()) if env is None else [read.alone(env)]
    if task is not None and len(views) > 1:
        raise ConfigError(f"--task {task}: wanted its environment as well, --env {'|'.join(read.names)}")
    found = [preview_prompts(alone, turns=turns, task=task) for alone in views]
    if as_json:
        trees = [preview.to_dict() for preview in found]
        echo(json.dumps(trees if read.names and env is None else trees[0], indent=1, ensure_ascii=False))
        return
    for preview in found:
        _console().print(preview_text(preview), soft_wrap=True)  # line ends are the prompt's own


@app.command("check-env")
def check_env(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]... [KEY=VALUE]...",
            help="Environments to check, and arguments for them.",
            show_default=False,
            autocompletion=_env_ids,
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


@app.command("new-env")
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
    _echo_written(made.files, made.to_add, folder)
    given = f"--import {shlex.quote(str(folder / f'{made.names.module}.py'))}"
    echo(f"\nNext:\n  agentrl check-env {made.names.id} {given}")
    echo(f"  agentrl train env.id={made.names.id} evaluation.split=test evaluation.tasks=30 {given}")
    echo(f"\nOnce installed, it needs no --import:\n  python -m pip install -e {shlex.quote(str(folder))}")


@app.command("new-algorithm")
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
    _echo_written(made.files, made.to_add, folder)
    given = f"--import {shlex.quote(str(folder / f'{made.names.module}.py'))}"
    echo(f"\nNext:\n  python -m pytest {shlex.quote(str(folder / f'test_{made.names.module}.py'))}")
    echo(f"  agentrl algorithms {name} {given}")
    echo(f"  agentrl train configs/quickstart.yaml algorithm.name={name} {given}")
    echo(f"\nOnce installed, it needs no --import:\n  python -m pip install -e {shlex.quote(str(folder))}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or name of a run.")],
    imports: Imports = None,
) -> None:
    """Rewrite the report.html of a run, finished or not. Executes no code of the run."""
    from agentrl.evaluation.report import write_report
    from agentrl.run.folder import find_run

    load_imports(imports or ())
    echo(write_report(find_run(run)))


@app.command()
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and raise SystemExit.

    Args:
        arguments: The arguments; None takes them from the shell.
    """
    app(arguments, prog_name="agentrl")


def _echo_written(files: dict[Path, str], to_add: str | None, folder: Path) -> None:
    """Say what each new file is for, and what to add to a pyproject.toml that was left unchanged."""
    for path, what in files.items():
        echo(f"{path}: {what}")
    if to_add is not None:
        echo(f"{folder / 'pyproject.toml'} is left unchanged; add to it:\n\n{to_add}")


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
    _console().print(found)
    return f"{found.summary()} ({perf_counter() - start:.1f} s)", found.passed


def _lacks_another_package(error: ImportError, env: str) -> bool:
    """Return whether another package is not installed, rather than the environment's own being broken."""
    import gymnasium

    cause = error.__cause__
    if not isinstance(cause, ImportError):
        return True
    own = str(gymnasium.spec(env).entry_point).partition(":")[0].partition(".")[0]
    return isinstance(cause, ModuleNotFoundError) and (cause.name or own).partition(".")[0] != own


def _split_config(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Split the arguments into CONFIG, if given, and overrides."""
    given = list(arguments or ())
    if given and "=" not in given[0]:
        return given[0], given[1:]
    return None, given


def _split_keys(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `key=value` into keys of a configuration and arguments of an environment."""
    keys = [text for text in arguments if text.partition(".")[0] in ("policy", "rollout", "engine")]
    return keys, [text for text in arguments if text not in keys]


def _describe_os_error(error: OSError) -> str:
    path = str(error.filename or "a file").removesuffix(".partial")
    message = f"{path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{message}. Existing files are intact: free some space, then agentrl train --resume RUN"
    return message


def _console() -> "Console":
    from agentrl.terminal import Terminal

    return Terminal()


class _EpisodeCounter:
    """Live count of episodes on the terminal during an evaluation."""

    def __init__(self, what: str) -> None:
        from agentrl.terminal import Terminal

        self._what = what
        quiet = logging.getLogger("agentrl").level > logging.INFO
        self._status = Terminal(stderr=True, quiet=quiet).status(what)
        self._episodes = self._successes = 0

    def __enter__(self) -> "_EpisodeCounter":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, episode: "Episode") -> None:
        self._episodes += 1
        self._successes += episode.success
        self._status.update(f"{self._what}: {self._episodes} episodes, {self._successes} successes")
