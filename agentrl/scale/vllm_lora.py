"""LoRA adapters in the form that vLLM reads; does not import vLLM."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from agentrl.errors import ConfigError
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter
from agentrl.policy.settings import EngineConfig

NAME = "agentrl"  # of the only adapter that vLLM holds, which each new one replaces
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM (0.32) can make room


def check_rank(config: EngineConfig, adapters: LoraConfig | None) -> None:
    """Refuse adapters that are too large for vLLM.

    Raises:
        ConfigError: With the key that merges them instead.
    """
    if config.takes_adapters and adapters is not None and adapters.rank > RANKS[-1]:
        raise ConfigError(
            f"learner.lora.rank is {adapters.rank}, wanted at most {RANKS[-1]} for an adapter in vLLM, or "
            "engine.vllm.lora=merged"
        )


def room(adapters: LoraConfig) -> int:
    """Return the least rank for which vLLM can make room that holds adapters.

    >>> room(LoraConfig(rank=3)), room(LoraConfig(rank=16)), room(LoraConfig(rank=17))
    (8, 16, 32)
    """
    return next(rank for rank in RANKS if rank >= adapters.rank)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as the part of a peft folder that vLLM reads."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in adapter.weights}
    settings = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(layers),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = {name: values.contiguous() for name, values in adapter.weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
