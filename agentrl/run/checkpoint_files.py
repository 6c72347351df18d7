"""Files of a checkpoint: their names, their hashes and the tensors in them."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import Tensor, nn

from agentrl.errors import CheckpointError
from agentrl.learn.sharding import stored_shards
from agentrl.policy.precision import non_finite
from agentrl.run.records import read_hashes

SHARDED_POLICY = "learned.policy."  # prefix of the policy's weights among the shards
WEIGHTS, SHARDS = "weights.safetensors", "shards"  # of what is learned, in one file or by rank
REFERENCE, REFERENCE_SHARDS = "reference.safetensors", "reference"
REWARD_MODEL, REWARD_MODEL_SHARDS = "reward_model.safetensors", "reward_model"  # trained beside the policy
ADAPTER = "adapter"  # a peft folder: with LoRA, the only weights in a checkpoint


def checkpoint_name(path: Path) -> str | None:
    """Return the name of a checkpoint; None for any other folder, such as a model's."""
    is_checkpoint = path.parent.name == "checkpoints" and (path / "progress.json").is_file()
    return path.name if is_checkpoint else None


def has_adapter(path: Path) -> bool:
    """Return whether a checkpoint holds adapters and no other weights."""
    return (path / ADAPTER).is_dir()


def load_weights(path: Path, model: nn.Module) -> None:
    """Read the weights of a verified checkpoint without adapters into a model of the policy's shape.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        if (path / WEIGHTS).exists():
            load_model(model, str(path / WEIGHTS))
            return
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in stored_shards(path / SHARDS):
                if name.startswith(SHARDED_POLICY):
                    own.pop(name.removeprefix(SHARDED_POLICY)).copy_(values)
        if own:
            raise KeyError(next(iter(own)))
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: its weights do not fit this policy ({error})") from error


def non_finite_tensors(path: Path) -> list[str]:
    """Return the names of the tensors of a checkpoint that hold nan or inf, reading one at a time."""
    return [name for tensor in _checkpoint_tensors(path) for name in non_finite([tensor])]


def _checkpoint_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and optimizer states of a checkpoint by name, without stateful components."""
    for file in (WEIGHTS, f"{ADAPTER}/adapter_model.safetensors", REFERENCE, REWARD_MODEL):
        if (path / file).exists():
            with safe_open(path / file, framework="pt") as weights:
                yield from ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
    for shards in (SHARDS, REFERENCE_SHARDS, REWARD_MODEL_SHARDS):
        if (path / shards).exists():
            yield from stored_shards(path / shards)
    state = read_state(path, mmap=True)
    yield from _named_tensors(
        {name: value for name, value in state.items() if name not in ("replay", "stateful")}
    )


def _named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers, each with its dotted path."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _named_tensors(value, f"{name}.{key}".removeprefix("."))


def read_state(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read the state of the learner and of the algorithm's components, without the policy's weights.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    file, remedy = path / "learner.pt", f"remove {path} to resume from an older checkpoint"
    try:
        state = torch.load(file, weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises many types on damaged files
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}); {remedy}") from error
    if not isinstance(state, dict) or "replay" not in state:
        raise CheckpointError(f"{file}: not the state of a learner; {remedy}")
    return state


def verify_hashes(path: Path) -> None:
    """Refuse a checkpoint of which a file is missing, was changed or was added.

    Raises:
        CheckpointError: Naming the files.
    """
    remedy = "remove it to resume from an older one"
    try:
        hashes = read_hashes(path)
        there = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        unlisted = [
            name for name in there if name not in {*hashes, "hashes.json"} and not name.startswith(".")
        ]
        wrong = [name for name, digest in hashes.items() if sha256(path / name) != digest]
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{path}: incomplete checkpoint ({error}); {remedy}") from error
    if absent := sorted({"learner.pt", "progress.json"} - set(hashes)):
        raise CheckpointError(
            f"{path}: incomplete checkpoint (hashes.json lacks {', '.join(absent)}); {remedy}"
        )
    if unlisted:
        raise CheckpointError(f"{path}: hashes.json does not list {', '.join(unlisted)}; {remedy}")
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)} changed after it was written; {remedy}")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
