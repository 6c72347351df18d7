"""The base of adapters: frozen weights, which a run keeps only if they are nowhere else."""

from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from agentrl.errors import CheckpointError
from agentrl.learn.lora import base_weights
from agentrl.policy.model import load_policy, save_policy
from agentrl.run.adapter import Base, weights_digest
from agentrl.training.setup import Session

_FOLDERS = {"warm_start": "warm_start_base", "train": "base"}  # in a run's folder, by stage


def describe_base(session: Session, stage: str, policy: nn.Module) -> Base:
    """Return a record of the frozen weights of a policy with adapters; all ranks call it together.

    A run has a base of its own if it made it with random weights, trained it in the warm start, or read it
    from an adapter and its base, which peft could not load as one.
    """
    path, source = session.config.policy.path, session.policy.source
    digest = weights_digest(base_weights(policy))
    cloned = stage == "train" and session.config.warm_start.steps > 0
    if path is None or cloned or (source is not None and source.adapter is not None):
        return Base(_FOLDERS[stage], own=True, sha256=digest)
    return Base(path, own=False, sha256=digest, revision=session.config.policy.revision)


def save_base(session: Session, base: Base, policy: nn.Module) -> None:
    """Save the base as a Hugging Face folder if the run has one of its own; all ranks call it together."""
    ranks, folder = session.ranks, session.run.folder / base.path
    if not base.own or ranks.run_on_rank0(folder.is_dir):
        return
    # Every rank gathers every weight, and only the first keeps them.
    weights = {name: values.cpu() for name, values in base_weights(policy) if ranks.first}
    save = partial(save_policy, session.policy.served, session.policy.tokenizer, folder)
    ranks.run_on_rank0(lambda: save(weights=weights))


def load_base(session: Session, base: Base, checkpoint: Path) -> PreTrainedModel:
    """Load a base that the run has kept itself.

    Raises:
        CheckpointError: If it is gone or damaged.
    """
    folder = session.run.folder / base.path
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint}: its adapters were learned over the weights in {folder}, which is gone; restore "
            "it from a copy, or start a new run"
        )
    return load_policy(folder, device=session.config.policy.device)[0]
