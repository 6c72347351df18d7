"""One worker, started to be weighed: what an environment takes, and whether it can be played in at all."""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from agentrl.data.storage import write_episodes
from agentrl.env.registry import Factory
from agentrl.errors import ConfigError
from agentrl.rollout.collector import abort_reasons, collect
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.run.evaluate import configured_panel
from agentrl.run.settings import RunConfig

EPISODES = 4
LONGEST = 20  # turns


@dataclass(frozen=True)
class Trial:
    """What a random player found in one worker.

    Args:
        worker: bytes of its process and those that it started, with one environment.
        environment: bytes that a second one added.
        turns: of an episode, at most as many as the trial allows.
        stored: bytes of an episode on disk, its text alone.
        tasks: how many there are to train on.
        panel: how many there are to be measured on.
        other_goals: whether the instruction check has anything to ask.
    """

    worker: int
    environment: int
    turns: float
    stored: int
    tasks: int
    panel: int
    other_goals: bool


def try_out(config: RunConfig) -> Trial:
    """Play a few random episodes in one worker, first in one environment and then in two, and weigh it.

    Raises:
        AgentRLError: when the environment, its tasks or its panel are not there.
    """
    workers = replace(config.rollout.workers, count=1, environments=2)
    before = _bytes_of_children()
    with ProcessEnvironments(environment_factory(config), 2, workers) as environments:
        with environments.borrow() as environment:
            known: Any = environment.unwrapped
            tasks: Sequence[str] = known.tasks(config.env.split)
            panel = configured_panel(config, environment)
            other_goals = callable(getattr(known, "other_goal", None))
        specs = [
            EpisodeSpec(f"plan-{index}", config.env.id, tasks[index % len(tasks)], index)
            for index in range(EPISODES)
        ]
        weights = []
        for active in (1, 2):
            played = collect(
                specs, RandomPlayer(), environments, max_active=active, max_turns=LONGEST
            ).episodes
            weights.append(_bytes_of_children() - before)
    finished = [episode for episode in played if not episode.stop.aborted]
    if not finished:
        raise ConfigError(f"env: every episode of {config.env.id} was aborted: {dict(abort_reasons(played))}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.parquet"
        write_episodes(file, finished)
        stored = file.stat().st_size // len(finished)
    turns = sum(len(episode.turns) for episode in finished) / len(finished)
    first, both = weights
    return Trial(first, max(0, both - first), turns, stored, len(tasks), len(panel.tasks), other_goals)


def check_expert(config: RunConfig) -> None:
    """Make sure that there is one, where the warm start wants to clone it.

    Raises:
        ConfigError: when there is none.
    """
    if not config.warm_start.steps:
        return
    factory = environment_factory(config, expert=True)
    try:
        with ProcessEnvironments(factory, 1, config.rollout.workers) as environments, environments.borrow():
            pass
    except ConfigError as error:
        raise ConfigError(
            f"warm_start.steps is {config.warm_start.steps}, but {config.env.id} has no expert to clone "
            f"({error})"
        ) from error


def environment_factory(config: RunConfig, **more: Any) -> Factory:
    """Makes the environments that a run trains in."""
    return Factory(config.env.id, split=config.env.split, **{**config.env.kwargs, **more})


def _bytes_of_children() -> int:
    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended since
            total += child.memory_info().rss
    return total
