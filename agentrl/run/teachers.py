"""The teacher of a run: found, checked against the policy, loaded and recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentrl.errors import AgentRLError, CheckpointError, ConfigError
from agentrl.policy.model import (
    context_length,
    load_policy,
    load_tokenizer,
    output_weight,
    resolve_device,
    skeleton,
)
from agentrl.policy.precision import engine_copy
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.sources import resolve
from agentrl.policy.tokens import fingerprint
from agentrl.run.adapter import weights_digest
from agentrl.run.folder import Run
from agentrl.run.records import read_manifest
from agentrl.run.settings import RunConfig
from agentrl.run.weights import SavedPolicy, find_model, find_policy, load_saved, tokenizer_of


@dataclass(frozen=True)
class LoadedTeacher:
    """Frozen model that a run distils.

    Args:
        name: The value of `learner.teacher`.
        revision: The commit of a model from the hub, else None.
        model: The model, in its own dtype.
        tokenizer: Its tokenizer.
    """

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def record(self) -> dict[str, Any]:
        """Return what tells it from other teachers, as JSON, for the manifest of a run."""
        return {
            "source": self.name,
            "revision": self.revision,
            "sha256": weights_digest(self.model.named_parameters()),
            "tokenizer": fingerprint(self.tokenizer),
        }

    def describe(self) -> str:
        """Return a line that names it."""
        parameters = sum(each.numel() for each in self.model.parameters())
        return f"teacher: {self.name}, {parameters:,} parameters in {self.model.dtype}".replace("torch.", "")

    def check(self, config: RunConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a policy whose tokens the teacher does not read as they are.

        Raises:
            ConfigError: Naming what differs.
        """
        _check_tokenizers(self.name, self.tokenizer, tokenizer)
        _check_sizes(config, self.model, policy)


def load_teacher(config: RunConfig) -> LoadedTeacher | None:
    """Load the teacher that the configuration names, if it names one.

    Raises:
        CheckpointError: If there is no such model, or it cannot be read.
    """
    name = config.learner.teacher
    if name is None:
        return None
    block, dtype = config.policy, teacher_dtype(config)
    with _naming(name):
        found = find_policy(name)
        if found is not None:
            model, tokenizer = load_saved(found)
            model = engine_copy(model, getattr(torch, dtype))
            cast(nn.Module, model).to(resolve_device(block.device))
            return LoadedTeacher(name, None, model.requires_grad_(False), tokenizer)
        source = find_model(name, config.learner.teacher_revision)
        model, tokenizer = load_policy(source, device=block.device, dtype=dtype)
        return LoadedTeacher(name, source.asked.revision, model.requires_grad_(False), tokenizer)


def check_teacher(config: RunConfig) -> None:
    """Refuse a teacher that does not fit the policy, as far as that shows without its weights.

    Whether a tokenizer that the run fits is the teacher's is seen only when it is there.

    Raises:
        CheckpointError: If there is no such model.
        ConfigError: Naming what differs from the policy.
    """
    name, block = config.learner.teacher, config.policy
    assert name is not None
    with _naming(name):
        model, tokenizer = teacher_skeleton(config), _teacher_tokenizer(name, config)
    if block.path is not None:
        own = load_tokenizer(resolve(block.path, block.revision, weights=False), block.chat_template)
        _check_tokenizers(name, tokenizer, own)
        _check_sizes(config, model, skeleton(block))
    elif tokenizer.chat_template is not None:
        raise ConfigError(
            f"learner.teacher={name} has a chat template, and the policy, whose tokenizer is fitted, has "
            "none; wanted a teacher with the policy's tokenizer and chat template"
        )


def check_same_teacher(run: Run, found: dict[str, Any]) -> None:
    """Refuse to go on with another teacher than the run recorded.

    Raises:
        CheckpointError: Naming both.
    """
    known = (read_manifest(run.folder) or {}).get("teacher")
    if not isinstance(known, dict):
        raise CheckpointError(
            f"{run.folder}/manifest.json: names no teacher, but learner.teacher is {found['source']!r}; "
            "restore it from a copy, or start a new run"
        )
    differing = [key for key in ("sha256", "tokenizer") if known.get(key) != found[key]]
    if differing:
        told = ", ".join(
            f"{key} {str(known.get(key))[:12]}, found {str(found[key])[:12]}" for key in differing
        )
        raise CheckpointError(
            f"{run.folder}: was taught by another model than learner.teacher={found['source']} holds now "
            f"({told}); restore the teacher as it was, or start a new run"
        )


def teacher_dtype(config: RunConfig) -> Literal["float32", "bfloat16", "float16"]:
    """Return the dtype of the teacher's weights."""
    return config.learner.teacher_dtype or config.policy.dtype


def teacher_skeleton(config: RunConfig) -> PreTrainedModel:
    """Return the teacher on torch's meta device.

    Raises:
        CheckpointError: If there is no such model.
    """
    assert config.learner.teacher is not None
    block = _block(config.learner.teacher, config)
    return skeleton(replace(block, dtype=teacher_dtype(config)))


def _block(name: str, config: RunConfig) -> PolicyConfig:
    found = find_policy(name)
    if found is None:
        return replace(config.policy, path=name, revision=config.learner.teacher_revision)
    if _is_whole(found):
        return replace(found.run.config.policy, path=str(found.run.model), revision=None)
    return found.run.config.policy  # a checkpoint or adapters have the sizes of what the run began with


def _teacher_tokenizer(name: str, config: RunConfig) -> PreTrainedTokenizerBase:
    found = find_policy(name)
    if found is None:
        return load_tokenizer(resolve(name, config.learner.teacher_revision, weights=False))
    return load_tokenizer(found.run.model) if _is_whole(found) else tokenizer_of(found.run)


def _is_whole(saved: SavedPolicy) -> bool:
    return saved.checkpoint is None and saved.adapter is None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the key in the message of an error."""
    try:
        yield
    except AgentRLError as error:
        raise type(error)(f"learner.teacher={name}: {error}") from error


def _check_tokenizers(name: str, teacher: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> None:
    theirs, ours = fingerprint(teacher), fingerprint(own)
    if theirs != ours:
        raise ConfigError(
            f"learner.teacher={name} has another tokenizer ({len(teacher)} ids, fingerprint {theirs[:12]}) "
            f"than the policy ({len(own)} ids, {ours[:12]}), so that a token means something else to it; "
            "wanted the same vocabulary. Fitted tokenizers are the same for the same env, seed and "
            "policy.vocab_size"
        )
    if teacher.chat_template != own.chat_template:
        raise ConfigError(
            f"learner.teacher={name} has another chat template than the policy, and would read prompts that "
            "it was not trained on; wanted the same, see policy.chat_template"
        )


def _check_sizes(config: RunConfig, teacher: PreTrainedModel, own: PreTrainedModel) -> None:
    name = config.learner.teacher
    theirs, ours = len(output_weight(teacher)), len(output_weight(own))
    if theirs != ours:
        raise ConfigError(
            f"learner.teacher={name} has {theirs} output ids and the policy {ours}, wanted the same number"
        )
    wanted = context_length(own, config.policy.max_context)
    if (read := context_length(teacher, wanted)) < wanted:
        raise ConfigError(
            f"learner.teacher={name} reads {read} tokens, fewer than the policy's {wanted}; wanted a lower "
            "policy.max_context, or another teacher"
        )
