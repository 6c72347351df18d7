"""The commands about a run before it starts: `agentrl config`, `plan` and `prompt`."""

from typing import Annotated

import typer

from agentrl.commands.arguments import Imports, Overrides, split_config
from agentrl.commands.group import ExitCode
from agentrl.commands.screen import console
from agentrl.errors import ConfigError
from agentrl.plugins import load_imports
from agentrl.terminal import echo


def config(arguments: Overrides = None, imports: Imports = None) -> None:
    """Print a complete configuration, with defaults filled in and `extends` resolved.

    - `agentrl config configs/quickstart.yaml seed=1 > mine.yaml`
    """
    from agentrl.run.settings import config_yaml, load_config

    path, overrides = split_config(arguments)
    echo(config_yaml(load_config(path, *overrides, imports=load_imports(imports or ()))), nl=False)


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

    path, overrides = split_config(arguments)
    read = load_config(path, *overrides, imports=load_imports(imports or ()))
    found = make_plan(read, processes=processes, nodes=nodes)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=1))
    else:
        console().print(plan_table(found))
        for line in found.notes:
            echo(f"note: {line}", style="yellow")
        for line in found.missing or ("nothing is missing",):
            echo(f"missing: {line}" if found.missing else line, style="red" if found.missing else "green")
    if found.missing:
        raise typer.Exit(ExitCode.MISSING)


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

    path, overrides = split_config(arguments)
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
        console().print(preview_text(preview), soft_wrap=True)  # line ends are the prompt's own
