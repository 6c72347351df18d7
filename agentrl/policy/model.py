"""Creation, loading and saving of the policy's network: a new small decoder, or a model that exists."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as progress

from agentrl.errors import AgentRLError, CheckpointError, ConfigError, NonFiniteError, RequirementError
from agentrl.files import replacing_folder
from agentrl.policy.adapter import merge_adapter
from agentrl.policy.architecture import check_packed_forward, without_weights
from agentrl.policy.attention import PACKED
from agentrl.policy.context import context_length, context_limit, shortened
from agentrl.policy.gguf import check_gguf, forget_quantization, read_gguf_config
from agentrl.policy.packed import embedding, hidden_states, output_weight, packed_forward
from agentrl.policy.precision import named_in_short, non_finite
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.sources import ADAPTER_CONFIG, ModelSource, resolve

__all__ = [
    "PolicyConfig",
    "build_model",
    "check_finite",
    "check_packed_forward",
    "context_length",
    "context_limit",
    "decoder_settings",
    "embedding",
    "end_ids",
    "hidden_states",
    "load_policy",
    "load_tokenizer",
    "output_weight",
    "packed_forward",
    "resolve_device",
    "save_policy",
    "shortened",
    "skeleton",
    "without_weights",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def build_model(config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the small decoder of `decoder_settings` with random weights.

    The weights depend on `seed` alone; the global random generators are left unchanged.
    """
    settings = decoder_settings(
        config, len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(settings)
    model.set_attn_implementation(PACKED)
    return _to_device(model, resolve_device(config.device), getattr(torch, config.dtype))


def decoder_settings(
    config: PolicyConfig, vocabulary: int, *, pad: int | None = None, end: int | None = None
) -> Qwen2Config:
    """Return the configuration of the model that `build_model` builds.

    It is a Qwen2 with an MLP of width 3 d and tied embeddings.

    Args:
        config: The sizes.
        vocabulary: The number of token ids.
        pad: The id of the padding token.
        end: The id of the token that ends a text.

    Raises:
        ConfigError: If the heads do not divide the width.
    """
    if config.hidden_size % (2 * config.heads):
        raise ConfigError(
            f"policy.hidden_size is {config.hidden_size}, wanted an even multiple of "
            f"policy.heads={config.heads}"
        )
    assert config.max_context is not None  # PolicyConfig wants it without a path
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_context,
        initializer_range=config.initial_std,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
    )


def _to_device(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    return cast(nn.Module, model).to(device=device, dtype=dtype).eval()  # type: ignore[return-value]


def resolve_device(name: str) -> torch.device:
    """Return the device of a name, where `auto` takes cuda if there is one, else the cpu.

    Raises:
        ConfigError: If this machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available.get(name, False):
        raise ConfigError(
            f"policy.device is {name!r}, which this machine does not have; wanted auto or one of "
            f"{', '.join(device for device, there in available.items() if there)}"
        )
    return torch.device(name)


def end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a text, by the `eos_token_id` of the model and of its generation config.

    Each may be a list, as in models that end a turn and a text with different tokens. Ids outside the
    vocabulary are left out, since they are never sampled.
    """
    vocabulary = output_weight(model).shape[0]
    settings = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    named = (getattr(each, "eos_token_id", None) for each in settings)
    return frozenset(id for ids in named for id in _as_list(ids) if 0 <= id < vocabulary)


def load_policy(
    source: ModelSource | str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    chat_template: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, and check its packed forward.

    The architecture is checked before the weights are read, in float32 whatever `dtype` is; see
    `check_packed_forward`. The weights are then checked to be finite in `dtype`.

    Args:
        source: The model, from `agentrl.policy.sources.resolve`; a path is a Hugging Face folder.
        device: The device, as `policy.device`.
        dtype: The dtype of the weights.
        chat_template: A file whose text replaces the tokenizer's chat template.

    Raises:
        CheckpointError: If a file is absent, corrupt or does not fit; the message says what to do.
        MissingDependencyError: If a package is missing, as for GGUF files and adapters.
        RequirementError: If the architecture cannot run over packed sequences.
    """
    source = _as_source(source)
    _check_files(source)
    tokenizer = load_tokenizer(source, chat_template)
    check_packed_forward(_model_without_weights(source))
    model = _load_model(source, getattr(torch, dtype))
    if source.adapter is not None:
        model = merge_adapter(model, source.adapter.folder, source.path)
    if len(tokenizer) > output_weight(model).shape[0]:
        raise CheckpointError(
            f"{source.path}: the tokenizer has {len(tokenizer)} ids, the model "
            f"{output_weight(model).shape[0]}; use the tokenizer that was saved with the model"
        )
    model = _to_device(model, resolve_device(device), getattr(torch, dtype))
    check_finite(source.path, model)
    return model, tokenizer


def _as_source(source: ModelSource | str | Path) -> ModelSource:
    return source if isinstance(source, ModelSource) else ModelSource(Path(source), name=str(source))


def _read_config(source: ModelSource) -> PreTrainedConfig:
    if source.gguf_file is not None:
        return read_gguf_config(source.path)
    return cast(
        PreTrainedConfig,
        AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False),
    )


def _model_without_weights(source: ModelSource) -> PreTrainedModel:
    try:
        return without_weights(_read_config(source))
    except RequirementError:
        raise
    except Exception as error:  # the library's parsers may raise anything
        raise _unreadable(source, error) from error


def skeleton(config: PolicyConfig) -> PreTrainedModel:
    """Return the policy that generates, on torch's meta device: every shape and no weights.

    Args:
        config: The policy; without a `path`, its vocabulary has the size that the configuration asks for.

    Raises:
        CheckpointError: If there is no model at `policy.path`.
        MissingDependencyError: If a package is missing that reads it.
        RequirementError: If its attention cannot be replaced.
        ConfigError: If the sizes contradict each other.
    """
    if config.path is None:
        return _on_meta(decoder_settings(config, config.vocab_size), config.dtype)
    source = resolve(config.path, config.revision, weights=False)
    try:
        if source.gguf_file is not None:
            check_gguf(source.path)
        elif not (source.folder / "config.json").is_file():
            raise FileNotFoundError("no config.json is there")
        return _on_meta(_read_config(source), config.dtype)
    except AgentRLError:
        raise
    except Exception as error:  # the library's parsers may raise anything
        raise CheckpointError(
            f"policy.path is {config.path!r}, wanted a Hugging Face causal language model: {source.path} "
            f"cannot be read as one ({' '.join(str(error).split())[:160]})"
        ) from error


def _on_meta(settings: Any, dtype: str) -> PreTrainedModel:
    model = cast(nn.Module, without_weights(settings))
    return cast(PreTrainedModel, model.to(getattr(torch, dtype)).eval())


def check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Refuse weights that are not finite, or that give logits that are not, in the model's precision.

    Raises:
        CheckpointError: Naming the folder, and the tensor that is not finite, if any.
    """
    dtype = str(output_weight(model).dtype).removeprefix("torch.")
    overflow = "; bfloat16 and float32 hold larger numbers" if dtype == "float16" else ""
    if lost := non_finite(cast(nn.Module, model).state_dict().items()):
        raise CheckpointError(
            f"{folder} holds values that are not finite: {named_in_short(lost)}, read as {dtype}{overflow}; "
            "copy the folder again, or take an earlier checkpoint"
        )
    tokens = torch.arange(min(8, context_limit(model)), device=output_weight(model).device)
    with torch.inference_mode():
        states = hidden_states(model, tokens % len(output_weight(model)), torch.tensor([len(tokens)]))
        logits = states @ output_weight(model).T
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            f"{folder}: all weights are finite, but the logits are not in policy.dtype={dtype}{overflow}"
        )


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder (safetensors) beside `path` and rename it into place: all of it or nothing.

    The weights are written in the model's dtype; `from_pretrained(path, dtype=...)` rounds them when it loads
    them.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        path: The folder to write.
        weights: The weights to write in place of the model's, under the same names.

    Raises:
        NonFiniteError: If weights are not finite; a folder that was at `path` is left unchanged.
        CheckpointError: If it cannot be written, as on a full disk; a folder that was at `path` is left
            unchanged.
    """
    target = Path(path)
    written = cast(nn.Module, model).named_parameters() if weights is None else weights.items()
    if lost := non_finite(written):
        raise NonFiniteError(f"{target}: not saved, since {named_in_short(lost)} holds nan or inf")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(target) as folder:
            with _no_progress_bars():
                model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: the policy could not be saved ({error}); make room or choose another folder. "
            "The previous content is unchanged"
        ) from error


def _check_files(source: ModelSource) -> None:
    if source.gguf_file is not None:
        check_gguf(source.path)
        return
    folder = source.folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; wanted a Hugging Face model folder on this machine")
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: {ADAPTER_CONFIG} says that it is an adapter, wanted a whole model; an adapter is "
            "read as a policy.path, and its base must be a whole model"
        )
    if not (folder / "config.json").is_file():
        others = ", ".join(path.name for path in sorted(folder.glob("*.gguf")))
        raise CheckpointError(
            f"{folder}: config.json is missing; wanted a Hugging Face model folder"
            + (f", or one of its files: {others}" if others else "")
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: no *.safetensors file; other formats can contain code and are not read. "
            "Load the model with the tool that wrote it and save it with save_pretrained(folder)"
        )
    if not _has_tokenizer(_tokenizer_source(source).folder):
        raise CheckpointError(
            f"{folder}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}); save it there with "
            "tokenizer.save_pretrained(folder)"
        )
    _check_end_ids(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer_source(source: ModelSource) -> ModelSource:
    """Return the adapter if a tokenizer was saved with it, else the model itself."""
    return source.adapter if source.adapter and _has_tokenizer(source.adapter.folder) else source


def _check_end_ids(folder: Path) -> None:
    """Refuse files whose end ids would be ignored, or crash much later."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); copy it again from where it came from"
            ) from error
        ids = settings.get("eos_token_id") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or not all(type(id) is int for id in _as_list(ids)):
            raise CheckpointError(f"{path}: eos_token_id is {ids!r}, wanted a token id or a list of them")


def _as_list(ids: Any) -> list[Any]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def load_tokenizer(
    source: ModelSource | str | Path, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with the class that it was saved with.

    Args:
        source: The model; a path is a Hugging Face folder.
        chat_template: A file whose text replaces the chat template, as `policy.chat_template`.

    Raises:
        CheckpointError: If it cannot be read.
    """
    source = _tokenizer_source(_as_source(source))
    try:
        # AutoTokenizer takes the usual class of the model type, even where the folder names another.
        kind = (
            PreTrainedTokenizerFast
            if source.gguf_file is None and _tokenizer_class(source.folder) in GENERIC_TOKENIZERS
            else AutoTokenizer
        )
        tokenizer = cast(Any, kind).from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False, **_file_argument(source)
        )
    except Exception as error:  # the library's parsers may raise anything
        remedy = (
            "save it again with tokenizer.save_pretrained(folder)"
            if source.gguf_file is None
            else "the file is damaged, or the library cannot read its kind"
        )
        raise CheckpointError(
            f"{source.path}: the tokenizer cannot be read ({_brief(error)}); {remedy}"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    return cast(PreTrainedTokenizerBase, tokenizer)


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.chat_template is {str(path)!r}, which cannot be read ({error})") from error
    if not text.strip():
        raise ConfigError(f"policy.chat_template is {str(path)!r}, which is empty; wanted a Jinja template")
    return text


def _file_argument(source: ModelSource) -> dict[str, str]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _tokenizer_class(folder: Path) -> str | None:
    """Return the class that a tokenizer was saved with, if it is a fast one and the folder says so."""
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    return cast(str | None, json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class"))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable the library's progress bars during the block."""
    before = progress.is_progress_bar_enabled()
    cast(Any, progress).disable_progress_bar()
    try:
        yield
    finally:
        if before:
            cast(Any, progress).enable_progress_bar()


@_no_progress_bars()
def _load_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            source.folder,
            dtype=dtype,
            attn_implementation=PACKED,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_file_argument(source),
            **({} if source.gguf_file is None else {"config": _read_config(source)}),
        )
    except Exception as error:  # the library's parsers may raise anything
        raise _unreadable(source, error) from error
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"{source.path}: {len(wrong)} weights are absent or do not fit its configuration, first "
            f"{wrong[0]}; copy it again, or take an earlier checkpoint"
        )
    if source.gguf_file is not None:
        forget_quantization(model)
    return cast(PreTrainedModel, model)


def _unreadable(source: ModelSource, error: Exception) -> CheckpointError:
    what = "folder is corrupt" if source.gguf_file is None else "file is corrupt, of an unknown architecture"
    return CheckpointError(
        f"{source.path}: the model cannot be read ({_brief(error)}); the {what} or not of a "
        "causal language model: copy it again, or take an earlier checkpoint"
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no message'}"
