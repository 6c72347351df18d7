"""What comes before reinforcement learning: text for a tokenizer, demonstrations, behaviour cloning."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.batch import Batch, collate
from agentrl.data.trajectory import Episode, Group, StopReason
from agentrl.errors import ConfigError
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.policy.tokens import Dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import DemonstrationPlayer, Player
from agentrl.run.settings import RunConfig
from agentrl.seeds import derive_seed

OnEpisode = Callable[[Episode], None]
_MOST_TURNS = 1_000  # of an episode, where the configuration names no limit: an environment may have no end
_ENDLESS = 10  # episodes that came to that limit, after which no other end is expected
_MOST_TEXT = 1 << 26  # characters that a tokenizer is fitted on


def names_actions(tasks: Sequence[str], environments: Environments) -> bool:
    """Whether the environment offers a list of actions to choose from; else replies are free text."""
    info: Any = {}
    with suppress(Exception), environments.borrow() as environment:  # its episodes will record it
        _, info = environment.reset(seed=0, options={"task": tasks[0]})
    return info.get("actions") is not None


def environment_text(
    config: RunConfig, tasks: Sequence[str], environments: Environments, player: Player
) -> list[str]:
    """Observations and actions of training tasks as `player` plays them, for a tokenizer to be fitted on."""
    texts: list[str] = []
    left, endless = _MOST_TEXT, 0
    for spec in _specs(config, "tokenizer", config.policy.tokenizer_episodes, tasks):
        if left <= 0 or endless >= _ENDLESS:
            break
        (episode,) = collect(
            [spec], player, environments, max_active=1, max_turns=_most_turns(config)
        ).episodes
        endless += _is_endless(config, episode)
        for text in (
            *(turn.observation for turn in episode.turns),
            *(turn.action for turn in episode.turns),
        ):
            if left > 0:
                texts.append(text[:left])
                left -= len(text)
    if not texts:
        raise ConfigError(f"env: no text to fit a tokenizer on: every episode of {config.env.id} was aborted")
    return texts


def demonstrations(
    config: RunConfig,
    tasks: Sequence[str],
    environments: Environments,
    dialogue: Dialogue,
    on_episode: OnEpisode | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] | None = None,
) -> list[Episode]:
    """Successful episodes of the environment's expert, in a fixed order; each rank plays its part of them.

    Those with a turn that the policy could not play, for its context is full, are left out; `say` is told
    how many.

    Raises:
        ConfigError: when the environment has no expert, or it solves too few of its tasks.
    """
    block = config.warm_start
    player = DemonstrationPlayer(
        dialogue,
        noise=block.noise,
        seed=derive_seed(config.seed, "noise"),
        noise_prefers=block.noise_prefers,
        choices=config.rollout.constrained,
        max_context=config.policy.max_context,
        max_tokens=config.engine.max_tokens,
    )
    specs = list(_specs(config, "demonstration", block.demonstrations, tasks))
    solved_or_endless = [0, 0]

    def watch(episode: Episode) -> None:
        solved_or_endless[0] += episode.success
        solved_or_endless[1] += _is_endless(config, episode)
        if solved_or_endless[0] == 0 and solved_or_endless[1] >= _ENDLESS:
            raise ConfigError(
                f"warm_start.steps is {block.steps}, but the expert of {config.env.id} solved none of its "
                f"first tasks, and came to no end in {_ENDLESS} of them within {_MOST_TURNS} turns; if they "
                "are that long, set rollout.max_turns"
            )
        if on_episode is not None:
            on_episode(episode)

    own = ranks.agreed(
        lambda: (
            collect(
                ranks.deal(specs),
                player,
                environments,
                max_active=environments.capacity or 1,
                max_turns=_most_turns(config),
                max_attempts=config.rollout.max_attempts,
                quarantine=Quarantine(config.rollout.max_attempts),
                on_episode=watch,
            ).episodes
        )
    )
    played = ranks.collect(own)
    solved = [episode for episode in played if episode.success]
    long = sum(episode.stop is StopReason.CONTEXT_LIMIT for episode in played)
    too_long = f"{long} did not fit policy.max_context={config.policy.max_context}"
    if len(solved) < block.batch_size:
        others = Counter(
            episode.error for episode in played if episode.error and episode.stop != StopReason.CONTEXT_LIMIT
        )
        reasons = [too_long] * bool(long) + [f"{count} x {error}" for error, count in others.most_common(3)]
        raise ConfigError(
            f"warm_start.steps is {block.steps}, but the expert of {config.env.id} solved "
            f"{len(solved)} of {len(played)} tasks ({'; '.join(reasons) or 'it did not solve them'}); "
            f"wanted at least {block.batch_size}"
        )
    if long and say is not None:
        say(f"warning: of {len(played)} demonstrations {too_long} and are left out")
    return solved


def _most_turns(config: RunConfig) -> int:
    return _MOST_TURNS if config.rollout.max_turns is None else config.rollout.max_turns


def _is_endless(config: RunConfig, episode: Episode) -> bool:
    return config.rollout.max_turns is None and len(episode.turns) >= _MOST_TURNS


def cloning_batches(config: RunConfig, episodes: Sequence[Episode], first: int = 0) -> Iterator[Batch]:
    """One batch for each step from `first` on; each epoch has an order that depends only on the seed."""
    size = config.warm_start.batch_size
    per_epoch = len(episodes) // size
    order: list[int] = []
    for step in range(first, config.warm_start.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or not order:
            order = list(range(len(episodes)))
            random.Random(derive_seed(config.seed, "cloning", epoch)).shuffle(order)
        chosen = [episodes[index] for index in order[place * size : (place + 1) * size]]
        yield collate([Group(episode.task, (episode,)) for episode in chosen])


def cloning() -> Algorithm:
    """Behaviour cloning is an algorithm like any other."""
    return build_recipe("behaviour_cloning").build()


def _specs(config: RunConfig, use: str, count: int, tasks: Sequence[str]) -> Iterator[EpisodeSpec]:
    draw = random.Random(derive_seed(config.seed, use))
    for index in range(count):
        task = tasks[draw.randrange(len(tasks))]
        yield EpisodeSpec(f"{use}-{index}", config.env.id, task, derive_seed(config.seed, use, index))
