"""Adapters on disk: a peft folder, and a record of the base that they were learned over."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic reads no other under Python 3.11

from agentrl.errors import CheckpointError
from agentrl.files import read_json
from agentrl.learn.lora import adapter_settings
from agentrl.learn.settings import LoraConfig

_REMEDY = "copy the folder again, or take an earlier checkpoint"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "base.json")


@dataclass(frozen=True)
class Base:
    """Frozen weights that adapters are added to.

    Args:
        path: The `policy.path` of the run, or the name of a folder in the run's own folder.
        own: Whether the run keeps the base itself, since it is not the model at `policy.path`: the run made
            it with random weights, or trained it before the adapters were added.
        sha256: The digest of the weights in float32, see `weights_digest`.
        revision: The `policy.revision` of a model from a hub.
    """

    path: str
    own: bool
    sha256: str
    revision: str | None = None

    def check(self, sha256: str, what: str) -> None:
        """Refuse weights with another digest than the base's.

        Raises:
            CheckpointError: Naming `what` was learned over the base.
        """
        if sha256 != self.sha256:
            raise CheckpointError(
                f"{what}: its adapters were learned over other weights than {self.path} holds now (sha256 "
                f"{self.sha256[:12]}, found {sha256[:12]}); restore the base as it was"
            )


class _StoredBase(TypedDict):
    path: Annotated[str, Field(min_length=1)]
    own: bool
    sha256: str
    revision: str | None


class _StoredSettings(TypedDict):
    r: Annotated[int, Field(ge=1)]
    lora_alpha: FiniteFloat | int


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named weights; neither their order nor their device matters."""
    digests = {}
    for name, values in weights:
        raw: Any = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(raw).hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def write_adapter(
    folder: Path, policy: nn.Module, config: LoraConfig, weights: Mapping[str, Tensor], base: Base, run: Path
) -> None:
    """Write adapters as `peft.PeftModel.from_pretrained` reads them.

    Args:
        folder: The folder to write, which exists.
        policy: The policy with its adapters.
        config: The configuration of the adapters.
        weights: The adapters, from `adapter_weights`.
        base: The base.
        run: The folder of the run.
    """
    import peft

    named = str((run / base.path).resolve()) if base.own else base.path
    settings = peft.LoraConfig(
        **adapter_settings(policy, config),
        base_model_name_or_path=named,
        revision=base.revision,
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    save_file(dict(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "base.json").write_text(json.dumps(asdict(base), indent=1), encoding="utf-8")


def read_base(folder: Path) -> Base:
    """Read the record of the base of the adapters in a folder.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    found: dict[str, Any] = read_json(folder / "base.json", _StoredBase, _REMEDY)
    return Base(**found)


def read_scaling(folder: Path) -> float:
    """Return the factor of the adapters in a folder, alpha / rank.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    found = read_json(folder / "adapter_config.json", _StoredSettings, _REMEDY)
    return float(found["lora_alpha"] / found["r"])


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Read the adapters in a folder.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    path = folder / "adapter_model.safetensors"
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    return found
