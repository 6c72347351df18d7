"""From a name to someone who plays: a script, a run, or a Hugging Face folder."""

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentrl.data.trajectory import Episode
from agentrl.errors import AgentRLError, ConfigError
from agentrl.files import replacing_folder
from agentrl.policy.engine import Engine, SamplingParams
from agentrl.policy.model import (
    build_model,
    check_finite,
    context_length,
    end_ids,
    load_policy,
    load_tokenizer,
)
from agentrl.policy.precision import engine_copy
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import Dialogue, check_without_template, fit_tokenizer, make_dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import ExpertPlayer, LanguagePlayer, Player, RandomPlayer
from agentrl.run.folder import Run, changed_wording, open_run
from agentrl.run.settings import RunConfig
from agentrl.run.trust import caller_only_values, drop_caller_only_values
from agentrl.scale.engines import open_engine
from agentrl.seeds import derive_seed

FALLBACK_MAX_TURNS = 1_000  # limit where rollout.max_turns is None: an environment may never end an episode
MAX_ENDLESS_EPISODES = 10  # number of episodes at that limit after which no other outcome is expected
_MAX_TEXT_CHARS = 1 << 26  # limit of the text that a tokenizer is fitted on


@dataclass(frozen=True)
class Policy:
    """A model with its way of reading and writing turns.

    Args:
        model: what is learned, in float32.
        served: what generates: the model itself, or a copy of it in another `policy.dtype`, whose weights are
            rounded from those that are learned whenever these have changed.
        tokenizer: of both.
        dialogue: how turns are read and written.
    """

    model: PreTrainedModel
    served: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue

    def engine(self, config: RunConfig) -> Engine:
        return open_engine(
            self.served,
            config.engine,
            stop_ids=self.dialogue.stop_ids,
            max_context=config.policy.max_context,
            max_sequences=2 * config.rollout.max_active,  # those that wait to be branched from as well
            address=config.rollout.ray.address,
        )

    def player(self, engine: Engine, config: RunConfig, temperature: float) -> LanguagePlayer:
        sampling = SamplingParams(temperature=temperature, max_tokens=config.engine.max_tokens)
        return LanguagePlayer(self.dialogue, engine, sampling, choices=config.rollout.constrained)


def fit_policy(
    config: RunConfig,
    tasks: Sequence[str],
    environments: Environments,
    player: Player,
    tokenizer_folder: Path,
) -> Policy:
    """The policy a new run starts from: random weights and a tokenizer of the text that `player` plays.

    A tokenizer is fitted once per run and kept in `tokenizer_folder`.
    """
    check_without_template(config.policy.reply, config.policy.template_arguments)
    if not tokenizer_folder.is_dir():
        texts = environment_text(config, tasks, environments, player)
        fitted = fit_tokenizer(texts, config.policy.vocab_size)
        with replacing_folder(tokenizer_folder) as partial:
            fitted.save_pretrained(partial)
    tokenizer = load_tokenizer(tokenizer_folder)  # as a resumed run has it
    block = replace(config.policy, dtype="float32")
    model = build_model(block, tokenizer, derive_seed(config.seed, "weights"))
    return _make_policy(model, tokenizer, config.policy)


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
    left, endless = _MAX_TEXT_CHARS, 0
    for spec in drawn_specs(config, "tokenizer", config.policy.tokenizer_episodes, tasks):
        if left <= 0 or endless >= MAX_ENDLESS_EPISODES:
            break
        (episode,) = collect(
            [spec], player, environments, max_active=1, max_turns=turn_limit(config)
        ).episodes
        endless += is_endless(config, episode)
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


def turn_limit(config: RunConfig) -> int:
    """Return the most turns of an episode, where an environment may have no end."""
    return FALLBACK_MAX_TURNS if config.rollout.max_turns is None else config.rollout.max_turns


def is_endless(config: RunConfig, episode: Episode) -> bool:
    """Tell whether an episode came to the limit that only stands in for a missing one."""
    return config.rollout.max_turns is None and len(episode.turns) >= FALLBACK_MAX_TURNS


def drawn_specs(config: RunConfig, use: str, count: int, tasks: Sequence[str]) -> Iterator[EpisodeSpec]:
    """Draw the tasks of `count` episodes; `use` names their purpose, and so their random stream."""
    draw = random.Random(derive_seed(config.seed, use))
    for index in range(count):
        task = tasks[draw.randrange(len(tasks))]
        yield EpisodeSpec(f"{use}-{index}", config.env.id, task, derive_seed(config.seed, use, index))


def load(folder: str | Path, config: PolicyConfig) -> Policy:
    """Load the policy in a Hugging Face folder.

    Raises:
        CheckpointError: if the folder cannot be read, or its numbers overflow in `policy.dtype`.
    """
    model, tokenizer = load_policy(folder, device=config.device)
    policy = _make_policy(model, tokenizer, config)
    if policy.served is not model:
        check_finite(Path(folder), policy.served)
    return policy


def scripted_player(name: str, seed: int = 0) -> Player:
    """`random` or `expert`."""
    if name == "random":
        return RandomPlayer()
    if name == "expert":
        return ExpertPlayer()
    raise ConfigError(f"policy is {name!r}, wanted random or expert")


def open_player(
    policy: str, *, temperature: float = 1.0, config: RunConfig | None = None
) -> tuple[Player, RunConfig]:
    """Open whoever `policy` names, in this process: whatever a run generated with, `torch` reads its weights.

    Args:
        policy: `random`, `expert`, a run's folder or name, or a Hugging Face folder. Where prompts are others
            than the run recorded, as with a chat template that writes the date, it is warned of.
        temperature: 0 plays greedily.
        config: how to play where `policy` is no run and so does not say it; None takes the defaults.

    Returns:
        The player, and the configuration it was opened with (a run's own).

    Raises:
        CheckpointError: when nothing of that name can be opened.
    """
    if policy in ("random", "expert"):
        return scripted_player(policy), config or RunConfig()
    opened, asked = _open_run_or_none(policy), config is not None
    if opened is not None:
        config, folder, asked = drop_caller_only_values(opened.config), opened.model, True
        _warn_of_dropped_values(opened)
    else:
        config, folder = config or RunConfig(), Path(policy)
    loaded = load(folder, config.policy)
    changed = opened and changed_wording(opened, loaded.dialogue.wording)
    if changed:
        warnings.warn(changed, RuntimeWarning, stacklevel=2)
    # The default was nobody's wish, so a model that holds less needs no word about it.
    limit = context_length(loaded.model, config.policy.max_context if asked else None)
    block = replace(config.policy, path=str(folder), max_context=min(limit, config.policy.max_context))
    config = replace(config, engine=replace(config.engine, name="torch", actors=None), policy=block)
    return loaded.player(loaded.engine(config), config, temperature), config


def _warn_of_dropped_values(run: Run) -> None:
    if named := ", ".join(caller_only_values(run.config)):
        warnings.warn(
            f"{run.folder} names {named}: not used, since only who plays it may name programs, servers and "
            "what shuts code in",
            RuntimeWarning,
            stacklevel=3,
        )


def _make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PolicyConfig) -> Policy:
    dialogue = make_dialogue(
        tokenizer,
        reply=config.reply,
        max_observation_tokens=config.max_observation_tokens,
        stop_ids=end_ids(model),
        template_arguments=config.template_arguments,
    )
    return Policy(model, engine_copy(model, getattr(torch, config.dtype)), tokenizer, dialogue)


def _open_run_or_none(policy: str) -> Run | None:
    """A run of that folder or name; None for a folder that is none, or a model's that holds a config.yaml."""
    try:
        return open_run(policy)
    except AgentRLError:
        folder = Path(policy)
        if not folder.is_dir() or (
            (folder / "config.yaml").exists() and not (folder / "config.json").exists()
        ):
            raise
        return None
