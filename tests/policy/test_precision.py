"""The engine's copy of the learned weights in another precision, and the search for nan and inf."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentrl.policy.precision import engine_copy, named_in_short, non_finite


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()


def test_a_float32_engine_reads_the_very_model_that_is_learned() -> None:
    model = llama()
    assert engine_copy(model, torch.float32) is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_engine_has_a_copy_of_rounded_weights_and_exact_rotary_frequencies(
    dtype: torch.dtype,
) -> None:
    model = llama()
    copied = engine_copy(model, dtype)
    assert {value.dtype for value in copied.parameters()} == {dtype}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    for (name, own), (same, other) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert name == same
        assert own.requires_grad == other.requires_grad
        assert own.data_ptr() != other.data_ptr()
        assert torch.equal(own.detach().to(dtype), other.detach())
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    buffers, theirs = dict(model.named_buffers()), dict(copied.named_buffers())
    assert buffers.keys() == theirs.keys() != set()
    assert all(torch.equal(value, theirs[name]) for name, value in buffers.items())


def test_a_copy_goes_back_to_a_model_of_its_own_in_float32() -> None:
    copied = engine_copy(llama(), torch.bfloat16)
    again = engine_copy(copied, torch.float32)
    assert again is not copied
    assert all(value.dtype == torch.float32 for value in again.parameters())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_with_one_number_that_is_none_are_named(wrong: float, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(3, 5, dtype=dtype) for name in ("one", "two", "three")}
    tensors |= {"empty": torch.ones(0), "count": torch.tensor(7)}
    assert non_finite(tensors.items()) == []
    for name in ("one", "three"):
        tensors[name][1, 2] = wrong
    assert non_finite(tensors.items()) == ["one", "three"]


def test_the_largest_number_is_a_number() -> None:
    largest = torch.finfo(torch.float32).max
    assert non_finite([("large", torch.full((1000,), -largest))]) == []
    assert non_finite([]) == []


def test_tensors_are_named_in_short() -> None:
    assert named_in_short(["norm"]) == "norm"
    assert named_in_short(["norm", "head", "bias"]) == "norm and 2 more"
