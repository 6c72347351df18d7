"""LoRA adapters in peft's folders, merged into the model that they were trained on."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from agentrl.errors import CheckpointError, missing_extra

_WEIGHTS = "adapter_model.safetensors"


def merge_adapter(model: PreTrainedModel, adapter: Path, base: Path) -> PreTrainedModel:
    """Return the model with an adapter merged into its weights, in the model's precision.

    Args:
        model: The base, on the CPU; it is changed.
        adapter: The folder of the adapter.
        base: The folder or file of the base, for messages.

    Raises:
        MissingDependencyError: If peft is not installed.
        CheckpointError: If the adapter has no safetensors, is damaged, or was trained on another base.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise missing_extra(f"{adapter}: an adapter needs peft", "lora") from error
    stored = _stored_names(adapter / _WEIGHTS)
    try:
        settings = peft.LoraConfig.from_pretrained(str(adapter))
        if settings.megatron_config is not None:  # names a module to import
            raise ValueError("its megatron_config asks for code of its own")
        adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=settings, torch_device="cpu")
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if other := sorted(wanted ^ {name for name in stored if name in wanted or ".lora_" in name}):
            raise ValueError(f"{len(other)} matrices are only in one of the two, first {other[0]}")
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft may raise anything
        raise CheckpointError(
            f"{adapter}: the adapter does not fit its base {base} ({_first_words(error)}); wanted the "
            "model that it was trained on, as base_model_name_or_path of its adapter_config.json"
        ) from error
    return merged


def _stored_names(path: Path) -> set[str]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no {_WEIGHTS}; other formats can contain code and are not read. Load the "
            "adapter with peft and save it with save_pretrained(folder)"
        )
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the adapter again") from error


def _first_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
