"""A tokenizer of a few words and the tiny models that the policy tests run."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer

TEXTS = [
    "You see a mug 1, a mug 2 and a desk 1.",
    "take mug 1 from desk 1",
    "go to shelf 1",
    "open fridge 1",
] * 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return fit_tokenizer(TEXTS, 320)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Two layers of two heads, with weights large enough that positions and masks matter to the logits."""
    model = build_model(PolicyConfig(device="cpu", max_context=256, initial_std=0.02), tokenizer, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6.0)
    return model
