"""Models in GGUF files, read and dequantised by the library's own reader (package `gguf`)."""

import copy
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from agentrl.errors import CheckpointError, missing_extra

_MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF file, or that cannot be read here.

    Raises:
        CheckpointError: If it is absent or begins in another way.
        MissingDependencyError: If a package for it is not installed.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if magic != _MAGIC:
        raise CheckpointError(f"{path}: is not a GGUF file, or a damaged one; copy it again")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_extra(f"{path}: a GGUF file needs {' and '.join(missing)}", "gguf")


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """Return the configuration of the model in a GGUF file, which is read once per process."""
    stat = path.stat()
    return copy.deepcopy(_read_config(path.absolute(), stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)  # it takes seconds
def _read_config(path: Path, _changed: int, _size: int) -> PreTrainedConfig:
    found: PreTrainedConfig = AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    return found


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove what marks a dequantised model as quantised, so that it can be trained and saved."""
    quantized: Any = model
    for settings in (model.config, model.config.get_text_config()):
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
    quantized.hf_quantizer, quantized.is_quantized = None, False
    vars(quantized).pop("quantization_method", None)
