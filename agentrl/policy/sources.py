"""Find the model that `policy.path` names: a folder, a GGUF file, a packaged model or one of the hub.

Nothing that a model brings along is executed: weights are tensors, and a chat template runs in a sandbox.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from agentrl.errors import AgentRLError, CheckpointError, ConfigError
from agentrl.policy.settings import ENDPOINT

GROUP = "agentrl.models"  # each entry point loads a function that returns the path of a folder or GGUF file
ADAPTER_CONFIG = "adapter_config.json"

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What is downloaded: no pickles, no code, nothing below the top folder.
_DESCRIPTIONS = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"]
_WEIGHTS = ["*.safetensors"]
_UNUSED = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Files of a model on this machine, and where they came from.

    Args:
        folder: The folder of the files.
        gguf_file: The name of the GGUF file in it that is read; None reads a Hugging Face folder.
        name: The name that was asked for.
        origin: How the name was resolved.
        revision: The commit of a model from the hub, else None.
        adapter: A LoRA adapter that is merged into the model, else None.
    """

    folder: Path
    gguf_file: str | None = None
    name: str = ""
    origin: Literal["folder", "GGUF file", "package", "hub"] = "folder"
    revision: str | None = None
    adapter: "ModelSource | None" = None

    @property
    def path(self) -> Path:
        """Return the folder, or the GGUF file."""
        return self.folder / (self.gguf_file or "")

    @property
    def asked(self) -> "ModelSource":
        """Return the source that the name stood for: the adapter if there is one, else this one."""
        return self.adapter or self

    def record(self) -> dict[str, Any]:
        """Return the values as JSON, for the manifest of a run."""
        values = asdict(self) | {"folder": str(self.folder.absolute())}
        return values | {"adapter": self.adapter.record() if self.adapter else None}


def resolve(name: str, revision: str | None = None, *, weights: bool = True) -> ModelSource:
    """Find a model: a folder or GGUF file, else a packaged model, else an id of the hub.

    The hub is used through huggingface_hub, with its cache and its environment variables such as HF_HOME,
    HF_TOKEN and HF_HUB_OFFLINE. An adapter comes with its base, which is found in the same way.

    Args:
        name: The value of `policy.path`.
        revision: The branch, tag or commit of a model on the hub; None takes the default branch.
        weights: Whether a model of the hub is downloaded with its weights, or only what describes it.

    Raises:
        CheckpointError: If there is no such model, or it cannot be downloaded; all that was tried is named.
        ConfigError: If a revision is given for a model that has none.
    """
    if name.startswith(ENDPOINT):
        raise ConfigError(
            f"policy.path is {name!r}, a model on a chat server, which can only be evaluated: "
            f"agentrl evaluate --policy {name}"
        )
    found = _find(name, revision, weights)
    if found.gguf_file is not None or not (found.folder / ADAPTER_CONFIG).is_file():
        return found
    base_name, base_revision = _base_of(found.folder / ADAPTER_CONFIG)
    try:
        base = _find(base_name, base_revision, weights)
    except AgentRLError as error:
        raise CheckpointError(
            f"{found.folder / ADAPTER_CONFIG}: the base of this adapter is {base_name!r}, which is not "
            f"found: {error}"
        ) from error
    return replace(base, adapter=found)


def packaged_models() -> list[str]:
    """Return the names of the models that installed packages offer."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def _find(name: str, revision: str | None, weights: bool) -> ModelSource:
    path, packaged = Path(name).expanduser(), name in packaged_models()
    if not path.exists() and not packaged:
        return _from_hub(name, revision, weights)
    if revision is not None:
        raise ConfigError(
            f"policy.revision is {revision!r}, but policy.path={name} is on this machine, where a model has "
            "no revisions; wanted null, or the id of a model on the hub"
        )
    if not path.exists():
        return _packaged(name)
    if packaged:
        _warn_once(f"{name} is {path.absolute()}, not the packaged model of that name")
    elif _HUB_ID.fullmatch(name) and _cached_folder(name).is_dir():
        _warn_once(f"{name} is {path.absolute()}, not the model of that id in {_cached_folder(name)}")
    return _on_disk(path, name)


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def _on_disk(path: Path, name: str) -> ModelSource:
    if path.is_dir():
        return ModelSource(path, name=name)
    if path.suffix == ".gguf":
        return ModelSource(path.parent, path.name, name, "GGUF file")
    raise CheckpointError(f"{path}: is a file; wanted the folder of a model, or a file that ends in .gguf")


def _packaged(name: str) -> ModelSource:
    offers = {entry.value: entry for entry in entry_points(group=GROUP) if entry.name == name}
    if len(offers) > 1:
        raise ConfigError(f"packaged model {name!r} is offered more than once: {', '.join(sorted(offers))}")
    ((value, entry),) = offers.items()
    try:
        path = Path(entry.load()())
        return replace(_on_disk(path, name), origin="package")
    except AgentRLError:
        raise
    except (Exception, SystemExit) as error:  # a module that calls exit() must not end the process
        raise CheckpointError(
            f"packaged model {name!r} ({value}): {type(error).__name__}: {error}"
        ) from error


def _base_of(path: Path) -> tuple[str, str | None]:
    """Return the name and the revision of an adapter's base."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base, revision, kind = (
            settings.get(key) for key in ("base_model_name_or_path", "revision", "peft_type")
        )
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the adapter again") from error
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}, wanted LORA, which can be merged into its base"
        )
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {base!r} and revision {revision!r}, wanted the model that "
            "the adapter was trained on"
        )
    return base, revision


def _from_hub(name: str, revision: str | None, weights: bool) -> ModelSource:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"policy.path is {name!r}, wanted {_tried(name)}, or a hub id ORGANISATION/NAME"
        )
    try:
        folder = _download(name, revision, weights)
    except Exception as error:  # the client and its network library may raise anything
        raise CheckpointError(
            f"policy.path is {name!r}, wanted {_tried(name)}, or a model of the hub: "
            f"{_reason(name, revision, error)}"
        ) from error
    return ModelSource(folder, name=name, origin="hub", revision=folder.name)


@cache  # a plan asks many times, and each would ask the hub
def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_DESCRIPTIONS, *(_WEIGHTS if weights else ())]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNUSED))


def _tried(name: str) -> str:
    packaged = ", ".join(packaged_models()) or "none is installed"
    return (
        f"a folder or .gguf file (there is none at {Path(name).expanduser().absolute()}), a packaged model "
        f"({packaged})"
    )


def _reason(name: str, revision: str | None, error: Exception) -> str:
    """Say in a line why the hub gave no model, and what to do."""
    from huggingface_hub import constants, errors

    wanted = name if revision is None else f"policy.revision={revision} of {name}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no {wanted}; wanted a branch, tag or commit of that model"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated; ask for access on its page, and log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"it has no {name}, or a private one; for that, log in with: hf auth login"
    if isinstance(error, errors.HFValidationError):
        return f"{name} is no id of it ({_short(error)})"
    cached = f"{wanted} is not, or not completely, in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"{cached}, and HF_HUB_OFFLINE forbids downloads"
    return f"{cached}, and cannot be downloaded ({_short(error.__cause__ or error)})"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _cached_folder(name: str) -> Path:
    """Return the folder in which the hub's cache keeps a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
