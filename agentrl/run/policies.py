"""Policies and players, opened by the name of a script, a run or a model."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.files import replacing_folder
from agentrl.learn.settings import LoraConfig
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.engine import Engine, SamplingParams
from agentrl.policy.model import (
    check_finite,
    context_length,
    end_ids,
    load_policy,
)
from agentrl.policy.precision import engine_copy
from agentrl.policy.prompt import Example
from agentrl.policy.settings import ENDPOINT, PolicyConfig
from agentrl.policy.sources import ModelSource
from agentrl.policy.tokens import check_without_template, configured_dialogue, fit_tokenizer
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import ChooseSampling, LanguagePlayer, Player, scripted_player
from agentrl.run.examples import find_examples
from agentrl.run.folder import Run, changed_wording
from agentrl.run.settings import RunConfig, load_config, with_changes
from agentrl.run.tasks import random_tasks
from agentrl.run.trust import caller_only_values, drop_caller_only_values
from agentrl.run.weights import SavedPolicy, find_model, find_policy, initial_weights, load_saved
from agentrl.scale.endpoint import open_endpoint
from agentrl.scale.engines import open_engine
from agentrl.seeds import derive_seed

_log = logging.getLogger(__name__)

FALLBACK_MAX_TURNS = 1_000  # limit where rollout.max_turns is None: an environment may never end an episode
MAX_ENDLESS_EPISODES = 10  # number of episodes at that limit after which no other outcome is expected
_MAX_TEXT_CHARS = 1 << 26  # limit of the text that a tokenizer is fitted on


@dataclass(frozen=True)
class Policy:
    """Model with its tokenizer and its format of turns.

    Args:
        model: The trained model, in float32.
        served: The model that generates: `model` itself, or a copy in another `policy.dtype`, whose weights
            are rounded from the trained ones after each update.
        tokenizer: The tokenizer of both.
        dialogue: The format in which turns are read and written.
        source: The files that the first weights were read from; None for random weights.
    """

    model: PreTrainedModel
    served: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue
    source: ModelSource | None = None

    def engine(self, config: RunConfig, adapters: LoraConfig | None = None) -> Engine:
        """Open the configured inference engine on the served model; see `open_engine`."""
        return open_engine(
            self.served,
            config.engine,
            stop_ids=self.dialogue.stop_ids,
            max_context=context_length(self.served, config.policy.max_context),
            max_sequences=2 * config.rollout.max_active,  # including sequences kept for branching
            address=config.rollout.ray.address,
            adapters=adapters,
        )

    def player(
        self,
        engine: Engine,
        config: RunConfig,
        temperature: float,
        choose_sampling: ChooseSampling | None = None,
    ) -> LanguagePlayer:
        """Make a player that samples its replies from the engine; see `LanguagePlayer`."""
        sampling = SamplingParams(temperature=temperature, max_tokens=config.engine.max_tokens)
        return LanguagePlayer(
            self.dialogue,
            engine,
            sampling,
            choices=config.rollout.constrained,
            choose_sampling=choose_sampling,
        )


def fit_policy(config: RunConfig, texts: Callable[[], Sequence[str]], tokenizer_folder: Path) -> Policy:
    """Make the initial policy of a run: random weights, and a tokenizer fitted on text of its environments.

    The tokenizer is fitted once per run and kept in `tokenizer_folder`.

    Args:
        config: The configuration of the run.
        texts: Returns the text, see `environment_text`; called if the folder does not hold the tokenizer.
        tokenizer_folder: The folder of the tokenizer.
    """
    check_fitted(config.policy)
    if not tokenizer_folder.is_dir():
        fitted = fit_tokenizer(texts(), config.policy.vocab_size)
        with replacing_folder(tokenizer_folder) as partial:
            fitted.save_pretrained(partial)
    return _make_policy(*initial_weights(config, tokenizer_folder), config.policy)


def check_fitted(block: PolicyConfig) -> None:
    """Refuse settings that a policy with a fitted tokenizer, which has no chat template, cannot follow.

    Raises:
        ConfigError: Naming the key.
    """
    check_without_template(
        block.reply,
        block.template_arguments,
        prompt=block.prompt,
        history=block.history,
        system_message=block.system_message,
    )


def names_actions(tasks: Sequence[str], environments: Environments) -> bool:
    """Return whether the environment lists its admissible actions; otherwise replies are free text."""
    info: Any = {}
    with suppress(Exception), environments.borrow() as environment:  # a failure is recorded by its episodes
        _, info = environment.reset(seed=0, options={"task": tasks[0]})
    return info.get("actions") is not None


def environment_text(
    config: RunConfig, tasks: Sequence[str], environments: Environments, player: Player, among: int = 1
) -> list[str]:
    """Return observations and actions of training tasks that `player` plays, to fit a tokenizer on.

    Args:
        config: The configuration of the run, with one environment.
        tasks: The training tasks.
        environments: The training environments.
        player: The player.
        among: The number of environments whose text the tokenizer is fitted on, each with an equal part.
    """
    texts: list[str] = []
    left, endless = _MAX_TEXT_CHARS // among, 0
    for spec in drawn_specs(config, "tokenizer", -(-config.policy.tokenizer_episodes // among), tasks):
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
        label = config.only_env.label
        raise ConfigError(f"env: no text to fit a tokenizer on: every episode of {label} was aborted")
    return texts


def turn_limit(config: RunConfig) -> int:
    """Return the maximum number of turns of an episode, for environments that may never end one."""
    return FALLBACK_MAX_TURNS if config.rollout.max_turns is None else config.rollout.max_turns


def is_endless(config: RunConfig, episode: Episode) -> bool:
    """Return whether an episode reached `FALLBACK_MAX_TURNS` for lack of a configured limit."""
    return config.rollout.max_turns is None and len(episode.turns) >= FALLBACK_MAX_TURNS


def drawn_specs(config: RunConfig, use: str, count: int, tasks: Sequence[str]) -> Iterator[EpisodeSpec]:
    """Draw the tasks of `count` episodes; `use` names their purpose and selects the random stream."""
    for index, task in zip(range(count), random_tasks(tasks, config.seed, use), strict=False):
        env = config.environment_of(task).id
        yield EpisodeSpec(f"{use}-{index}", env, task, derive_seed(config.seed, use, index))


def load(source: ModelSource | str | Path, config: PolicyConfig, examples: Sequence[Example] = ()) -> Policy:
    """Load the policy of a model.

    Args:
        source: The model; a path is a Hugging Face folder.
        config: The `policy` block of the configuration.
        examples: The solved examples that its prompt shows.

    Raises:
        CheckpointError: If the model cannot be read, or its weights overflow in `policy.dtype`.
    """
    if not isinstance(source, ModelSource):
        source = ModelSource(Path(source), name=str(source))
    model, tokenizer = load_policy(source, device=config.device, chat_template=config.chat_template)
    return replace(_checked_policy(source.path, model, tokenizer, config, examples), source=source)


def open_saved(saved: SavedPolicy, config: RunConfig) -> Policy:
    """Load the policy that a run left.

    Args:
        saved: The weights.
        config: The configuration to use it with, usually that of the run.

    Raises:
        CheckpointError: If a file is missing or damaged, or the weights overflow in `policy.dtype`.
    """
    examples = find_examples(config, saved.run)
    return _checked_policy(saved.path, *load_saved(saved), config.policy, examples)


def _checked_policy(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PolicyConfig,
    examples: Sequence[Example],
) -> Policy:
    policy = _make_policy(model, tokenizer, config, examples)
    if policy.served is not model:
        check_finite(folder, policy.served)
    return policy


def open_player(
    policy: str,
    *,
    temperature: float = 1.0,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    base_url: str | None = None,
) -> tuple[Player, RunConfig]:
    """Open the player that `policy` names, in this process and with the `torch` engine.

    A warning is issued if the prompts differ from those that a run recorded, as with a chat template that
    writes the date.

    Args:
        policy: `random`, `expert`, a run's folder or name, a checkpoint RUN/checkpoints/NAME, a model as
            `policy.path` names one, or `openai:MODEL` for a model on a chat server. Of a run that has not
            finished, the newest checkpoint is taken.
        temperature: The sampling temperature; 0 is greedy.
        config: The configuration to play with if `policy` is not a run; None takes the defaults, for a model
            those of its size (`policy.preset`).
        overrides: `key=value` for the keys to play with instead, such as `policy.prompt=literature`; with a
            `config`, they are in it already.
        base_url: The address of the chat server of `openai:MODEL`; see `open_endpoint`.

    Returns:
        The player, and the configuration that it was opened with (for a run, the run's own).

    Raises:
        CheckpointError: If no policy of that name can be opened.
    """
    if policy.startswith(ENDPOINT):
        return _open_endpoint(
            policy, config or load_config(None, f"policy.path={policy}", *overrides), temperature, base_url
        )
    if base_url is not None:
        raise ConfigError(f"--base-url is for a policy {ENDPOINT}MODEL, not for {policy}")
    if policy in ("random", "expert"):
        return scripted_player(policy), config or with_changes(RunConfig(), overrides)
    saved, asked = find_policy(policy), config is not None
    if saved is not None:
        config, asked = with_changes(drop_caller_only_values(saved.run.config), overrides), True
        _warn_of_dropped_values(saved.run)
        if saved.checkpoint is not None and not saved.asked:
            _log.warning("%s", saved.describe())
        loaded = open_saved(saved, config)
        changed = changed_wording(saved.run, loaded.dialogue.wording)
        named = replace(config.policy, path=str(saved.path), revision=None, chat_template=None)
    else:
        config = config or load_config(None, f"policy.path={policy}", *overrides)
        source = find_model(policy, config.policy.revision)
        loaded, changed = load(source, config.policy, find_examples(config, None)), None
        named = replace(
            config.policy, path=source.asked.name or str(source.folder), revision=source.asked.revision
        )
    if changed:
        warnings.warn(changed, RuntimeWarning, stacklevel=2)
    # Nobody asked for the default, so a model with a shorter context needs no warning.
    limit = context_length(loaded.model, config.policy.max_context if asked else None)
    block = replace(named, max_context=min(limit, config.policy.max_context or limit))
    config = replace(config, engine=replace(config.engine, name="torch", actors=None), policy=block)
    return loaded.player(loaded.engine(config), config, temperature), config


def _open_endpoint(
    name: str, config: RunConfig, temperature: float, base_url: str | None
) -> tuple[Player, RunConfig]:
    """Open a player for a model on a chat server."""
    _log.info("%s replies in free text: no server can be held to the admissible commands", name)
    config = replace(config, rollout=replace(config.rollout, constrained=False))
    player = open_endpoint(
        name,
        config.policy,
        config.engine,
        temperature=temperature,
        base_url=base_url,
        examples=find_examples(config, None),
        max_aborted_share=config.rollout.max_aborted_share,
    )
    return player, config


def _warn_of_dropped_values(run: Run) -> None:
    if named := ", ".join(caller_only_values(run.config)):
        warnings.warn(
            f"{run.folder} sets {named}: not used, since only the caller may name programs and servers, or "
            "choose how code is isolated",
            RuntimeWarning,
            stacklevel=3,
        )


def _make_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PolicyConfig,
    examples: Sequence[Example] = (),
) -> Policy:
    dialogue = configured_dialogue(config, tokenizer, stop_ids=end_ids(model), examples=examples)
    return Policy(model, engine_copy(model, getattr(torch, config.dtype)), tokenizer, dialogue)
