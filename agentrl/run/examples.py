"""The solved examples that a prompt shows: the expert plays them, and the run's folder keeps them."""

import json
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any

from pydantic import TypeAdapter, ValidationError

from agentrl.errors import CheckpointError, ConfigError
from agentrl.files import write_atomic
from agentrl.policy.prompt import Example, load_prompt
from agentrl.policy.settings import PolicyConfig
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import ExpertPlayer
from agentrl.rollout.recording import RecordingPlayer
from agentrl.run.env_backend import environment_factory, open_one_environment
from agentrl.run.folder import Run
from agentrl.run.mixture import MixedEnvConfig
from agentrl.run.settings import RunConfig
from agentrl.seeds import derive_seed

_FILE = "examples.json"
_ATTEMPTS = 10  # tasks that are played for each example, at most
_MAX_TURNS = 100  # of an example


def shows_examples(block: PolicyConfig) -> bool:
    """Return whether the configured prompt shows solved examples."""
    prompt = load_prompt(block.prompt, block.history)
    return prompt is not None and "examples" in prompt.used and block.examples > 0


def find_examples(
    config: RunConfig, run: Run | None = None, excluded: Mapping[str, Collection[str]] | None = None
) -> tuple[Example, ...]:
    """Return the solved examples of a run's prompt: those that it recorded, else played now.

    Args:
        config: The configuration.
        run: The run, if there is one.
        excluded: Tasks that are evaluated on, and are not shown, by the label of their environment.

    Raises:
        CheckpointError: If the record is damaged.
        ConfigError: If an environment has no expert, or it solves too few tasks.
    """
    if not shows_examples(config.policy):
        return ()
    path = None if run is None else run.folder / _FILE
    if path is None or not path.exists():
        played = [
            play_examples(alone, (excluded or {}).get(alone.only_env.label, ()))
            for alone in config.each_alone()
        ]
        return tuple(example for examples in played for example in examples)
    try:
        return TypeAdapter(tuple[Example, ...]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path}: damaged, no record of solved examples") from error


def note_examples(run: Run, examples: Sequence[Example]) -> None:
    """Record the examples in the run's folder, unless it has them."""
    path = run.folder / _FILE
    if examples and not path.exists():
        listed = [
            {"task": example.task, "turns": example.turns} | ({"env": example.env} if example.env else {})
            for example in examples
        ]
        write_atomic(path, json.dumps(listed, indent=1, ensure_ascii=False))


def play_examples(config: RunConfig, excluded: Collection[str] = ()) -> tuple[Example, ...]:
    """Let the expert solve training tasks, in the same order in every run, until there are enough examples.

    Args:
        config: The configuration, with one environment.
        excluded: Tasks that are not played.

    Raises:
        ConfigError: If the environment has no expert, or it solves too few of them.
    """
    block, env = config.policy, config.only_env.id
    shown = f"policy.prompt={block.prompt} shows policy.examples={block.examples} solved tasks, but"
    hint = "wanted policy.examples=0, or a prompt without examples"
    most = _ATTEMPTS * block.examples
    examples: list[Example] = []
    try:
        factory = environment_factory(config, expert=True)
        with open_one_environment(factory, config.rollout) as environments:
            tasks = _drawn_tasks(config, environments, excluded, most)
            for task in tasks:
                found = _solved(config, environments, task)
                examples += [] if found is None else [found]
                if len(examples) == block.examples:
                    return tuple(examples)
    except ConfigError as error:
        raise ConfigError(f"{shown} {env} has no expert to solve them ({error}); {hint}") from error
    raise ConfigError(
        f"{shown} the expert of {env} solved {len(examples)} of {len(tasks)} training tasks that are not "
        f"evaluated on; {hint}"
    )


def _drawn_tasks(
    config: RunConfig, environments: Environments, excluded: Collection[str], most: int
) -> list[str]:
    """Draw at most `most` training tasks that are not excluded."""
    with environments.borrow() as environment:
        known: Any = environment.unwrapped
        tasks: Sequence[str] = known.tasks(config.only_env.split)
    left_out = frozenset(excluded)
    drawn = Random(derive_seed("examples")).sample(range(len(tasks)), min(len(tasks), most + len(left_out)))
    return [task for task in map(tasks.__getitem__, drawn) if task not in left_out][:most]


def _solved(config: RunConfig, environments: Environments, task: str) -> Example | None:
    """Return the expert's solution of a task; None if it does not solve it."""
    player = RecordingPlayer(ExpertPlayer())
    env = config.only_env
    spec = EpisodeSpec(f"example-{task}", env.id, task, derive_seed("example"))
    limit = min(config.rollout.max_turns or _MAX_TURNS, _MAX_TURNS)
    (episode,) = collect([spec], player, environments, max_active=1, max_turns=limit).episodes
    if not episode.success:
        return None
    told = player.requests[spec.id][0].briefing.task
    turns = tuple((turn.observation, turn.action) for turn in episode.turns)
    text = turns[0][0] if told is None else told
    return Example(text, turns, env.id if isinstance(env, MixedEnvConfig) else None)
