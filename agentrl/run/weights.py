"""Weights of runs: what they begin with, and what they left at their end or in a checkpoint."""

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentrl.errors import AgentRLError, CheckpointError, ConfigError
from agentrl.files import replacing_folder
from agentrl.learn.lora import merge_adapters
from agentrl.policy.model import build_model, load_policy, load_tokenizer, save_policy
from agentrl.policy.sources import ModelSource, resolve
from agentrl.run.adapter import (
    ADAPTER_FILES,
    Base,
    read_adapter_weights,
    read_base,
    read_scaling,
    weights_digest,
)
from agentrl.run.checkpoint import checkpoints, load_progress
from agentrl.run.checkpoint_files import ADAPTER, has_adapter, load_weights
from agentrl.run.folder import Run, find_run, open_run
from agentrl.run.settings import RunConfig
from agentrl.seeds import derive_seed

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class SavedPolicy:
    """Weights that a run left.

    Args:
        run: The run.
        checkpoint: The checkpoint that holds them; None for those that a finished run learned.
        asked: Whether the caller named the checkpoint.
    """

    run: Run
    checkpoint: Path | None = None
    asked: bool = False

    @property
    def adapter(self) -> Path | None:
        """Return the folder of the adapters, if the weights are adapters over a base."""
        if self.checkpoint is not None:
            return self.checkpoint / ADAPTER if has_adapter(self.checkpoint) else None
        return self.run.adapter if self.run.adapter.is_dir() else None

    @property
    def path(self) -> Path:
        """Return the folder that holds the weights."""
        return self.checkpoint or self.adapter or self.run.model

    def describe(self) -> str:
        """Return a line that names what is used in place of the result of a run that has not finished."""
        assert self.checkpoint is not None
        return f"{self.run.folder} has not finished: this is its newest checkpoint, {self.checkpoint.name}"


def initial_weights(
    config: RunConfig, tokenizer_folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the random weights that a run begins with, which its seed decides, and its fitted tokenizer."""
    tokenizer = load_tokenizer(tokenizer_folder)  # as a resumed run loads it
    block = replace(config.policy, dtype="float32")
    return build_model(block, tokenizer, derive_seed(config.seed, "weights")), tokenizer


def find_policy(name: str | Path) -> SavedPolicy | None:
    """Find what a run or a checkpoint of one left.

    Args:
        name: The folder of a run, or its name below `runs/`; or RUN/checkpoints/NAME.

    Returns:
        The trained policy of a finished run, the newest checkpoint of any other, or the named checkpoint;
        None if it is another name, such as a model's.

    Raises:
        CheckpointError: If there is nothing of that name, or the run has no checkpoint yet.
    """
    path, owner = Path(name), None
    if path.parent.name == "checkpoints":
        with suppress(CheckpointError):
            owner = find_run(path.parent.parent)
    if owner is not None:
        return named_checkpoint(open_run(owner), path.name)
    run = _open_run_or_none(str(name))
    if run is None:
        return None
    if run.model.is_dir() or run.adapter.is_dir():
        return SavedPolicy(run)
    found = checkpoints(run.checkpoints)
    if not found:
        raise CheckpointError(
            f"{run.folder}: has not finished and has no checkpoint yet, so there is no policy to load; "
            f"continue it with: agentrl train --resume {run.folder}"
        )
    return SavedPolicy(run, found[-1])


def find_model(name: str, revision: str | None) -> ModelSource:
    """Find the model of a name that is no run's.

    Raises:
        CheckpointError: If there is none; the message says why it is no run either.
    """
    try:
        return resolve(name, revision)
    except AgentRLError as no_model:
        if Path(name).exists():
            raise
        try:
            find_run(name)
        except CheckpointError as no_run:
            raise CheckpointError(f"{no_run}; as a model, {no_model}") from no_model
        raise


def named_checkpoint(run: Run, name: str) -> SavedPolicy:
    """Return a checkpoint of a run by its name, or by its training step.

    Raises:
        CheckpointError: If the run has no such checkpoint; the message lists those that there are.
    """
    found = {path.name: path for path in checkpoints(run.checkpoints)}
    wanted = f"train-{int(name):06d}" if re.fullmatch(r"\d{1,9}", name) else name
    if wanted not in found:
        there = ", ".join(found) or "none"
        raise CheckpointError(f"{run.checkpoints}: there is no {wanted}; the run has kept {there}")
    return SavedPolicy(run, found[wanted], asked=True)


def load_saved(saved: SavedPolicy) -> Loaded:
    """Load the weights in float32, with adapters merged into them, and the tokenizer.

    Raises:
        CheckpointError: If a file is missing or damaged, or adapters were learned over another base.
    """
    if saved.checkpoint is not None:
        load_progress(saved.checkpoint)  # verifies every file
    adapter = saved.adapter
    if adapter is not None:
        return _merged(saved.run, adapter)
    if saved.checkpoint is None:
        return load_policy(saved.run.model, device=saved.run.config.policy.device)
    model, tokenizer = _begun(saved.run)
    load_weights(saved.checkpoint, model)
    return model, tokenizer


def export(name: str, to: Path, *, merge: bool = False, checkpoint: str | None = None) -> SavedPolicy:
    """Write a policy to a new folder in the formats of Hugging Face.

    Args:
        name: The run, or a checkpoint of it, see `find_policy`.
        to: The folder to write, which must not exist.
        merge: Whether to write whole weights for a run that learned adapters, in place of a peft folder.
        checkpoint: The name or training step of a checkpoint; None as in `find_policy`.

    Raises:
        ConfigError: If the folder exists.
        CheckpointError: If there is no such policy, or it cannot be written.
    """
    if to.exists() or to.is_symlink():
        raise ConfigError(f"--to {to}: exists; choose a new folder")
    saved = find_policy(name) if checkpoint is None else named_checkpoint(open_run(name), checkpoint)
    if saved is None:
        raise CheckpointError(f"{name}: not a run; a model folder needs no export")
    if saved.adapter is None or merge:
        save_policy(*load_saved(saved), to)
        return saved
    if saved.checkpoint is not None:
        load_progress(saved.checkpoint)
    read_base(saved.adapter)
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(to, over=False) as partial:
        for file in ADAPTER_FILES:
            shutil.copyfile(saved.adapter / file, partial / file)
        tokenizer_of(saved.run).save_pretrained(partial)
    return saved


def _merged(run: Run, adapter: Path) -> Loaded:
    """Load the base of adapters, and add them to its weights."""
    base = read_base(adapter)
    model, tokenizer = _load_base(run, base, adapter)
    base.check(weights_digest(model.named_parameters()), str(adapter))
    try:
        merge_adapters(model, read_adapter_weights(adapter), read_scaling(adapter))
    except CheckpointError as error:
        raise CheckpointError(f"{adapter}: {error}") from error
    return model, tokenizer


def _load_base(run: Run, base: Base, adapter: Path) -> Loaded:
    if not base.own:
        return _load_model(run, base.path, base.revision)
    folder = run.folder / base.path
    if not folder.is_dir():
        raise CheckpointError(f"{adapter}: its base is gone, which {folder} held; restore it from a copy")
    return load_policy(folder, device=run.config.policy.device)


def _begun(run: Run) -> Loaded:
    """Return the policy that a run began with."""
    block = run.config.policy
    if block.path is not None:
        return _load_model(run, block.path, block.revision)
    return initial_weights(run.config, run.folder / "tokenizer")


def _load_model(run: Run, path: str, revision: str | None) -> Loaded:
    block = run.config.policy
    return load_policy(resolve(path, revision), device=block.device, chat_template=block.chat_template)


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run's policy.

    Raises:
        CheckpointError: If it cannot be read.
    """
    block = run.config.policy
    if block.path is None:
        return load_tokenizer(run.folder / "tokenizer")
    return load_tokenizer(resolve(block.path, block.revision, weights=False), block.chat_template)


def _open_run_or_none(policy: str) -> Run | None:
    """Open the run of that folder or name; return None for any other name, such as a model's."""
    try:
        return open_run(policy)
    except AgentRLError:
        path = Path(policy)
        broken_run = (path / "config.yaml").exists() and not (path / "config.json").exists()
        # A misspelt run below runs/ has the form of an id of the hub, which is not asked for it.
        if broken_run or (not path.exists() and path.parent == Path(RunConfig().run.folder)):
            raise
        return None
