"""The command that shows one episode: `agentrl play`."""

from typing import Annotated

import typer

from agentrl.commands.arguments import Imports, known_env_ids, policy_names
from agentrl.commands.screen import console
from agentrl.errors import AgentRLError
from agentrl.plugins import load_imports


def play(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Environment id.", autocompletion=known_env_ids)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The environment's own arguments.", show_default=False),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="human|random|expert|RUN|CHECKPOINT",
            help="Policy that plays.",
            autocompletion=policy_names,
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
        console(),
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
