"""From a name to someone who plays: a script, a run, or a Hugging Face folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentrl.errors import AgentRLError, ConfigError
from agentrl.policy.engine import Engine, SamplingParams
from agentrl.policy.model import build_model, load_policy, load_tokenizer
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import Dialogue, fit_tokenizer, make_dialogue
from agentrl.rollout.environments import Environments
from agentrl.rollout.players import ExpertPlayer, LanguagePlayer, Player, RandomPlayer
from agentrl.run.folder import Run, open_run
from agentrl.run.settings import RunConfig
from agentrl.run.warm_start import environment_text
from agentrl.scale.engines import open_engine
from agentrl.seeds import derive_seed


@dataclass(frozen=True)
class Policy:
    """A model with its way of reading and writing turns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue

    def engine(self, config: RunConfig) -> Engine:
        return open_engine(
            self.model,
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
    if tokenizer_folder.is_dir():
        tokenizer = load_tokenizer(tokenizer_folder)
    else:
        texts = environment_text(config, tasks, environments, player)
        tokenizer = fit_tokenizer(texts, config.policy.vocab_size)
        partial = tokenizer_folder.with_name(f".{tokenizer_folder.name}.partial")
        tokenizer.save_pretrained(partial)
        partial.rename(tokenizer_folder)
    model = build_model(config.policy, tokenizer, derive_seed(config.seed, "weights"))
    return _policy(model, tokenizer, config.policy)


def load(folder: str | Path, config: PolicyConfig) -> Policy:
    """The policy in a Hugging Face folder."""
    model, tokenizer = load_policy(folder, device=config.device, dtype=config.dtype)
    return _policy(model, tokenizer, config)


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
        policy: `random`, `expert`, a run's folder or name, or a Hugging Face folder.
        temperature: 0 plays greedily.
        config: how to play where `policy` is no run and so does not say it; None takes the defaults.

    Returns:
        The player, and the configuration it was opened with (a run's own).

    Raises:
        CheckpointError: when nothing of that name can be opened.
    """
    if policy in ("random", "expert"):
        return scripted_player(policy), config or RunConfig()
    opened = _run_or_none(policy)
    if opened is not None:
        config, folder = opened.config, opened.model
    else:
        config, folder = config or RunConfig(), Path(policy)
    engine = replace(config.engine, name="torch", actors=None)
    config = replace(config, engine=engine, policy=replace(config.policy, path=str(folder)))
    loaded = load(folder, config.policy)
    return loaded.player(loaded.engine(config), config, temperature), config


def _policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PolicyConfig) -> Policy:
    dialogue = make_dialogue(
        tokenizer, reply=config.reply, max_observation_tokens=config.max_observation_tokens
    )
    return Policy(model, tokenizer, dialogue)


def _run_or_none(policy: str) -> Run | None:
    try:
        return open_run(policy)
    except AgentRLError:
        folder = Path(policy)
        is_run = (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()
        if is_run or not folder.is_dir():
            raise
        return None
