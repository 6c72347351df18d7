"""The command that measures policies: `agentrl evaluate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentrl.commands.arguments import Imports, known_env_ids, policy_names, split_keys, suite_names
from agentrl.commands.group import ExitCode
from agentrl.commands.screen import EpisodeCounter, console, show_findings
from agentrl.errors import ConfigError
from agentrl.plugins import load_imports
from agentrl.terminal import echo

if TYPE_CHECKING:
    from agentrl.evaluation.statistics import TaskMean


def evaluate(
    policy: Annotated[
        list[str],
        typer.Option(
            metavar="RUN|CHECKPOINT|MODEL|openai:MODEL|random|expert",
            help="A run (if it has not finished, its newest checkpoint), RUN/checkpoints/NAME, a model as "
            "policy.path names one, a model on a chat server, or a scripted policy. Repeatable.",
            autocompletion=policy_names,
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
            metavar="ID", help="Environment; default: the run's. Repeatable.", autocompletion=known_env_ids
        ),
    ] = None,
    panel: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Panel of tasks, instead of a split. Repeatable."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="List of panels: text_games, or a YAML file.",
            autocompletion=suite_names,
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
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|CHECKPOINT|MODEL",
            help="The base of the policy: also compare what each of the two solves within --k plays.",
            autocompletion=policy_names,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(min=2, help="Largest k of pass@k with --against; default: --repeats."),
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
    - `agentrl evaluate --policy runs/NAME --against CHECKPOINT --repeats 256 --output runs/NAME/leash`
    - `agentrl evaluate --policy openai:MODEL --base-url http://127.0.0.1:8000/v1 --tasks 20`
    """
    from agentrl.config import merge
    from agentrl.evaluation.panel_lists import lists_panels

    load_imports(imports or ())
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    keys, own = split_keys(arguments or [])
    request = _Request(
        tuple(policy),
        tuple(panel or ()),
        suite,
        tuple(env or ()),
        output,
        against,
        k,
        {
            "split": split,
            "tasks": tasks,
            "env_kwargs": merge({}, own) if own else None,
            "repeats": repeats,
            "seed": seed,
            "temperature": 0.0 if greedy else 1.0,
            "placement": placement,
            "interpreter": interpreter,
            "config": config,
            "overrides": keys,
            "base_url": base_url,
        },
    )
    if request.names_several or (not request.names_tasks and lists_panels(policy[0], config, keys)):
        _evaluate_several(request)
    else:
        _evaluate_one(request)


@dataclass(frozen=True)
class _Request:
    """Policies and panels to evaluate, and the options.

    Args:
        policies: The policies.
        panels: The files of panels.
        suite: The name or file of a suite.
        envs: The ids of environments.
        output: The file or folder to write to.
        against: The base that the one policy is compared with.
        k: The number of plays of each task that are compared.
        playing: The keyword arguments that `evaluate` and `evaluate_panels` have in common.
    """

    policies: tuple[str, ...]
    panels: tuple[Path, ...]
    suite: str | None
    envs: tuple[str, ...]
    output: Path | None
    against: str | None
    k: int | None
    playing: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.against is not None and len(self.policies) > 1:
            raise ConfigError(f"--against: wanted one --policy, got {', '.join(self.policies)}")
        if self.k is not None and self.against is None:
            raise ConfigError("--k: wanted with --against only")

    @property
    def folder(self) -> Path | None:
        """Return the output if it is a folder, and not a file of JSON."""
        output = self.output
        if output is None or output.is_file() or (output.suffix == ".json" and not output.is_dir()):
            return None
        return output

    @property
    def names_several(self) -> bool:
        """Return whether there are several policies or panels, or a folder to write to."""
        most = max(map(len, (self.policies, self.envs, self.panels)))
        return most > 1 or (self.suite, self.folder, self.against) != (None, None, None)

    @property
    def names_tasks(self) -> bool:
        """Return whether the tasks are given here, and not by a configuration."""
        return bool(self.envs or self.panels or self.playing["split"] or self.playing["env_kwargs"])


def _evaluate_several(request: _Request) -> None:
    """Evaluate policies on several panels and print one table; exits with 1 if nothing could be played."""
    import json

    from agentrl.evaluation.diagnostics.leash import measure_leash
    from agentrl.evaluation.diagnostics.tables import leash_findings
    from agentrl.evaluation.panels_table import panels_table
    from agentrl.evaluation.suite import evaluate_panels
    from agentrl.files import write_atomic

    folder, leash = request.folder, None
    where = {"panels": request.panels, "suite": request.suite, "envs": request.envs, "output": folder}
    try:
        with EpisodeCounter("evaluating") as count:
            options = {**where, **request.playing, "on_episode": count}
            if request.against is None:
                found = evaluate_panels(request.policies, **options)
            else:
                found, leash = measure_leash(request.policies[0], request.against, k=request.k, **options)
    except KeyboardInterrupt as interrupt:
        kept = "" if folder is None else f": {folder} keeps the episodes so far, the same command goes on"
        raise KeyboardInterrupt(f"interrupted{kept}") from interrupt
    echo(found.title)
    console().print(panels_table(found.scores))
    for line in found.notes:
        echo(line)
    if leash is not None:
        show_findings(leash_findings(leash))
    if folder is not None:
        echo(f"results: {folder / 'results.md'}, results.json, episodes{', leash.*' if leash else ''}")
    elif request.output is not None:
        tree = found.to_dict() | ({"leash": leash} if leash else {})
        write_atomic(request.output, json.dumps(tree, indent=1))
    if not any(score.evaluation for scores in found.scores.values() for score in scores):
        raise typer.Exit(ExitCode.MISSING)


def _evaluate_one(request: _Request) -> None:
    """Evaluate a policy on one panel and print its table."""
    import json

    from agentrl.evaluation.evaluate import evaluate as measure
    from agentrl.evaluation.results_table import describe_usage, results_table
    from agentrl.files import write_atomic

    (policy,), playing = request.policies, request.playing
    panel, env = next(iter(request.panels), None), next(iter(request.envs), None)
    with EpisodeCounter("evaluating") as count:
        result = measure(policy, panel, env=env, on_episode=count, **playing)
    decoding = "sampled" if playing["temperature"] else "greedy"
    console().print(results_table({"policies": {policy: {decoding: result.to_dict()}}}))
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
    if request.output is not None:
        write_atomic(
            request.output,
            json.dumps(result.to_dict() | {"policy": policy, "seed": playing["seed"]}, indent=1),
        )


def _describe_rate(name: str, rate: "TaskMean") -> str:
    low, high = (f"{100 * end:.1f}" for end in rate.interval)
    value = "–" if rate.mean is None else f"{100 * rate.mean:.1f}"
    return f"{name} {value} [{low}, {high}]"
