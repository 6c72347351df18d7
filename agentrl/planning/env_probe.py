"""One worker, started to be weighed: what an environment takes, and whether it can be played in at all."""

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
from agentrl.env.registry import Factory
from agentrl.errors import ConfigError
from agentrl.evaluation.panels import configured_panel
from agentrl.policy.model import load_tokenizer
from agentrl.policy.tokens import Dialogue, fit_tokenizer, make_dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.failures import abort_reasons
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.run.settings import RunConfig

EPISODES = 4
LONGEST = 50  # turns


@dataclass(frozen=True)
class Trial:
    """What a random player found in one worker.

    Args:
        worker: bytes of its process and those that it started, with one environment.
        environment: bytes that a second one added.
        episodes: that it played, at most `LONGEST` turns of each.
        tasks: how many there are to train on.
        panel: how many there are to be measured on.
        other_goals: whether the instruction check has anything to ask.
    """

    worker: int
    environment: int
    episodes: tuple[Episode, ...]
    tasks: int
    panel: int
    other_goals: bool

    @property
    def turns(self) -> float:
        """Of an episode, on average."""
        return sum(len(episode.turns) for episode in self.episodes) / len(self.episodes)

    @property
    def cut(self) -> bool:
        """Whether an episode would have gone on."""
        return any(
            episode.stop is StopReason.TURN_LIMIT and len(episode.turns) == LONGEST
            for episode in self.episodes
        )


def try_out(config: RunConfig) -> Trial:
    """Play a few random episodes in one worker, first in one environment and then in two, and weigh it.

    Raises:
        AgentRLError: when the environment, its tasks or its panel are not there.
    """
    workers = replace(config.rollout.workers, count=1, environments=2)
    longest = min(config.rollout.max_turns or LONGEST, LONGEST)
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
        played: list[Episode] = []
        weights = []
        for active, part in ((1, specs[:1]), (2, specs[1:])):
            played += collect(
                part, RandomPlayer(), environments, max_active=active, max_turns=longest
            ).episodes
            weights.append(_bytes_of_children() - before)
    finished = tuple(episode for episode in played if not episode.stop.aborted)
    if not finished:
        raise ConfigError(f"env: every episode of {config.env.id} was aborted: {dict(abort_reasons(played))}")
    first, both = weights
    return Trial(first, max(0, both - first), finished, len(tasks), len(panel.tasks), other_goals)


def as_tokens(config: RunConfig, episodes: Sequence[Episode], context: int) -> list[Episode]:
    """Random play as a policy would have left it: in tokens, with made-up numbers of each.

    Replies are those that were played where the policy only chooses among them, and of `engine.max_tokens`
    where it writes freely. An episode ends where its sequence is full.

    Args:
        config: of the run; a policy of random weights gets a tokenizer of the text that was played.
        episodes: of random play.
        context: tokens that a sequence may hold.

    Raises:
        AgentRLError: when the policy has no tokenizer, or one that cannot hold a dialogue.
    """
    block, draw = config.policy, Random(0)
    if block.path is None:
        turns = [turn for episode in episodes for turn in episode.turns]
        texts = [text for turn in turns for text in (turn.observation, turn.action)]
        tokenizer: PreTrainedTokenizerBase = fit_tokenizer(texts, block.vocab_size)
    else:
        tokenizer = load_tokenizer(block.path)
    dialogue = make_dialogue(
        tokenizer,
        reply=block.reply,
        max_observation_tokens=block.max_observation_tokens,
        template_arguments=block.template_arguments,
    )
    thinks = getattr(dialogue, "thinking", None) is not None
    free = None if config.rollout.constrained and not thinks else config.engine.max_tokens
    return [
        replace(episode, turns=tuple(_in_tokens(episode, dialogue, free, context, draw)))
        for episode in episodes
    ]


def _in_tokens(
    episode: Episode, dialogue: Dialogue, free: int | None, context: int, draw: Random
) -> Iterator[Turn]:
    history: list[tuple[str, tuple[int, ...]]] = []
    length = 0
    for turn in episode.turns:
        prompt = dialogue.prompt(history, turn.observation)
        reply = dialogue.encode_reply(turn.action)
        if free is not None:
            reply = tuple(draw.choices(prompt.ids, k=free))
        length = len(prompt.ids) + len(reply) + (0 if prompt.new_sequence else length)
        if length > context:
            return
        history.append((turn.observation, reply))
        # Of a choice, all but the first token is often forced.
        numbers = tuple(draw.random() if free or not place else 0.0 for place in range(len(reply)))
        yield replace(
            turn, prompt_ids=prompt.ids, action_ids=reply, logprobs=numbers, entropies=numbers[::-1]
        )


def stored_bytes(episodes: Sequence[Episode]) -> int:
    """Of one of them on disk, on average."""
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for written in ((), episodes):
            file = Path(folder) / "trial.parquet"
            write_episodes(file, written)
            sizes.append(file.stat().st_size)
    nothing, all_ = sizes
    return (all_ - nothing) // len(episodes)


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
    factory = Factory(config.env.id, split=config.env.split, **{**config.env.kwargs, **more})
    factory.where = "env.kwargs."
    return factory


def _bytes_of_children() -> int:
    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended since
            total += child.memory_info().rss
    return total
