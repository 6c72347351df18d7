"""Tiny chat models of any architecture, saved as a folder from the hub would be."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from agentrl.policy.tokens import fit_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXTS = ["higher", "lower", "guess a number from 1 to 15", "go to desk 1", "take cd 1", "search[red shoes]"]


def chat_model(
    folder: Path, kind: Any = LlamaConfig, *, positions: int = 32768, template: str = CHATML
) -> Path:
    """Write a tiny model with a ChatML tokenizer, and return its folder."""
    tokenizer = fit_tokenizer(_TEXTS * 4, 400)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = kind(
        vocab_size=len(tokenizer),
        eos_token_id=4,
        max_position_embeddings=positions,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
