"""Random play in one worker, which shows that an environment works and what it costs."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from agentrl.data.storage import write_episodes
from agentrl.data.trajectory import Episode, StopReason, Turn
from agentrl.errors import ConfigError
from agentrl.evaluation.panels import configured_panel
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.model import load_tokenizer
from agentrl.policy.sources import resolve
from agentrl.policy.tokens import configured_dialogue, fit_tokenizer
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import abort_reasons
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.recording import RecordingPlayer, observations
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.run.env_backend import environment_factory
from agentrl.run.examples import find_examples
from agentrl.run.mixture import MixedEnvConfig
from agentrl.run.settings import RunConfig
from agentrl.run.tasks import tasks_by_environment

EPISODES = 4
MAX_TURNS = 50


@dataclass(frozen=True)
class EnvProfile:
    """Measurements of an environment under random play.

    Args:
        worker_bytes: The memory of a worker's processes, with one environment.
        environment_bytes: The memory that a second environment added.
        episodes: The episodes that were played, each of at most `MAX_TURNS` turns.
        tasks: The number of training tasks.
        panel: The number of evaluation tasks.
        has_other_goals: Whether the environment supports the instruction check.
        label: The label of the environment.
        share: Its share of the tasks that are drawn.
    """

    worker_bytes: int
    environment_bytes: int
    episodes: tuple[Episode, ...]
    tasks: int
    panel: int
    has_other_goals: bool
    label: str
    share: float = 1.0

    @property
    def mean_turns(self) -> float:
        """Return the mean number of turns of an episode."""
        return sum(len(episode.turns) for episode in self.episodes) / len(self.episodes)

    @property
    def truncated(self) -> bool:
        """Return whether an episode was ended by `MAX_TURNS`."""
        return any(
            episode.stop is StopReason.TURN_LIMIT and len(episode.turns) == MAX_TURNS
            for episode in self.episodes
        )


def profile_env(config: RunConfig) -> EnvProfile:
    """Play a few random episodes in one worker, in one environment and then in two, and measure its memory.

    Args:
        config: The configuration, with one environment.

    Raises:
        AgentRLError: If the environment, its tasks or its panel cannot be used.
    """
    workers = replace(config.rollout.workers, count=1, environments=2)
    max_turns = min(config.rollout.max_turns or MAX_TURNS, MAX_TURNS)
    before = _bytes_of_children()
    with ProcessEnvironments(environment_factory(config), 2, workers) as environments:
        with environments.borrow() as environment:
            unwrapped: Any = environment.unwrapped
            tasks: Sequence[str] = unwrapped.tasks(config.only_env.split)
            panel = configured_panel(config, environment)
            check_paraphrase(config, environment, tasks)
            other_goals = callable(getattr(unwrapped, "other_goal", None))
        specs = _specs(config, tasks)
        played: list[Episode] = []
        weights = []
        player = RecordingPlayer(RandomPlayer())
        for active, part in ((1, specs[:1]), (2, specs[1:])):
            found = collect(part, player, environments, max_active=active, max_turns=max_turns).episodes
            played += map(player.recorded, found)
            weights.append(_bytes_of_children() - before)
    completed = tuple(_completed(config, played))
    first, both = weights
    return EnvProfile(
        first,
        max(0, both - first),
        completed,
        len(tasks),
        len(panel.tasks),
        other_goals,
        config.only_env.label,
    )


def check_paraphrase(config: RunConfig, environment: Any, tasks: Sequence[str]) -> None:
    """Refuse an environment that gives no paraphrase to an algorithm that compares observations with one.

    Args:
        config: The configuration, with one environment.
        environment: The environment.
        tasks: Its training tasks.

    Raises:
        ConfigError: Naming the environment.
    """
    view = config.algorithm.build().view
    if view is None or view.perturbation != "paraphrase" or not tasks:
        return
    _, info = environment.reset(seed=0, options={"task": tasks[0]})
    if not isinstance(info.get("paraphrase"), str):
        env = config.only_env
        raise ConfigError(
            f"algorithm: perturbation=paraphrase, but {env.id} gives no info['paraphrase'] with "
            f"{env.key}.kwargs={dict(env.kwargs)}; wanted an environment that offers it, such as "
            "agentrl/ALFWorld-v0 with kwargs.paraphrase=true, or another perturbation"
        )


def profile_environments(config: RunConfig) -> list[EnvProfile]:
    """Measure each environment of a configuration, see `profile_env`."""
    profiles = [profile_env(alone) for alone in config.each_alone()]
    weights = [env.weight if isinstance(env, MixedEnvConfig) else 1.0 for env in config.environments]
    return [
        replace(profile, share=weight / sum(weights))
        for profile, weight in zip(profiles, weights, strict=True)
    ]


def play_random(config: RunConfig, environments: Environments, tasks: Sequence[str]) -> list[Episode]:
    """Play a few random episodes of training tasks, and return those that were not aborted.

    Raises:
        ConfigError: All were aborted.
    """
    max_turns = min(config.rollout.max_turns or MAX_TURNS, MAX_TURNS)
    player = RecordingPlayer(RandomPlayer())
    played = collect(_specs(config, tasks), player, environments, max_active=1, max_turns=max_turns).episodes
    return _completed(config, [player.recorded(episode) for episode in played])


def _specs(config: RunConfig, tasks: Sequence[str]) -> list[EpisodeSpec]:
    drawn = [own[index % len(own)] for own in tasks_by_environment(tasks) for index in range(EPISODES)]
    return [
        EpisodeSpec(f"plan-{index}", config.environment_of(task).id, task, index % EPISODES)
        for index, task in enumerate(drawn)
    ]


def _completed(config: RunConfig, played: Sequence[Episode]) -> list[Episode]:
    completed = [episode for episode in played if not episode.stop.aborted]
    if not completed:
        names = " and ".join(env.label for env in config.environments)
        raise ConfigError(f"env: every episode of {names} was aborted: {dict(abort_reasons(played))}")
    return completed


def tokenize_play(config: RunConfig, episodes: Sequence[Episode], context: int) -> list[Episode]:
    """Return random episodes with the tokens that a policy would have read and written.

    Logprobs and entropies are random numbers. Where the policy only chooses among actions, its replies are
    the actions that were played; where it writes freely, they have `engine.max_tokens` random tokens. An
    episode ends where the next turn would exceed the context.

    Args:
        config: The configuration of the run. Without a `policy.path`, a tokenizer is fitted to the episodes.
        episodes: Episodes of random play; of a `RecordedEpisode`, prompts show all that the player was told.
        context: The largest number of tokens in a sequence.

    Raises:
        AgentRLError: If the policy has no tokenizer, or one that cannot hold a dialogue.
    """
    block, draw = config.policy, Random(0)
    if block.path is None:
        turns = [turn for episode in episodes for turn in episode.turns]
        texts = [text for turn in turns for text in (turn.observation, turn.action)]
        tokenizer: PreTrainedTokenizerBase = fit_tokenizer(texts, block.vocab_size)
    else:
        source = resolve(block.path, block.revision, weights=False)
        tokenizer = load_tokenizer(source, block.chat_template)
    dialogue = configured_dialogue(block, tokenizer, examples=find_examples(config))
    thinks = getattr(dialogue, "thinking", None) is not None
    free = None if config.rollout.constrained and not thinks else config.engine.max_tokens
    return [
        replace(episode, turns=tuple(_tokenize_turns(episode, dialogue, free, context, draw)))
        for episode in episodes
    ]


def longest_sequence(episodes: Sequence[Episode]) -> int:
    """Return the largest number of tokens of a sequence."""
    return max((episode.longest_sequence for episode in episodes), default=0)


def _tokenize_turns(
    episode: Episode, dialogue: Dialogue, free: int | None, context: int, draw: Random
) -> Iterator[Turn]:
    history: list[tuple[str, tuple[int, ...]]] = []
    length = 0
    for observation, turn in zip(observations(episode), episode.turns, strict=True):
        own = dialogue.for_episode(observation.briefing)
        prompt = own.prompt(history, observation)
        reply = own.encode_reply(turn.action)
        if free is not None:
            reply = tuple(draw.choices(prompt.ids, k=free))
        length = len(prompt.ids) + len(reply) + (0 if prompt.new_sequence else length)
        if length > context:
            return
        history.append((observation, reply))
        # All tokens of a choice but the first are often forced.
        numbers = tuple(draw.random() if free or not place else 0.0 for place in range(len(reply)))
        yield replace(
            turn,
            prompt_ids=prompt.ids,
            action_ids=reply,
            logprobs=numbers,
            entropies=numbers[::-1],
            new_sequence=prompt.new_sequence,
        )


def stored_episode_bytes(episodes: Sequence[Episode]) -> int:
    """Return the mean size of an episode on disk, in bytes."""
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for written in ((), episodes):
            file = Path(folder) / "episodes.parquet"
            write_episodes(file, written)
            sizes.append(file.stat().st_size)
    empty, full = sizes
    return (full - empty) // len(episodes)


def check_expert(config: RunConfig) -> list[str]:
    """Refuse a warm start in environments none of which has an expert to clone.

    Returns:
        The labels of the environments that have none.

    Raises:
        ConfigError: Naming the environments.
    """
    if not config.warm_start.steps or config.warm_start.own_data:
        return []
    missing = {alone.only_env.label: error for alone in config.each_alone() if (error := _no_expert(alone))}
    if len(missing) == len(config.environments):
        names, reasons = " and ".join(missing), "; ".join(dict.fromkeys(map(str, missing.values())))
        raise ConfigError(
            f"warm_start.steps is {config.warm_start.steps}, but {names} has no expert to clone ({reasons})"
        ) from next(iter(missing.values()))
    return list(missing)


def _no_expert(config: RunConfig) -> ConfigError | None:
    """Return why an environment has no expert; None if it has one."""
    factory = environment_factory(config, expert=True)
    try:
        with ProcessEnvironments(factory, 1, config.rollout.workers) as environments, environments.borrow():
            return None
    except ConfigError as error:
        return error


def _bytes_of_children() -> int:
    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the process has ended
            total += child.memory_info().rss
    return total
