"""What a policy and its learner hold in memory, counted before their weights exist.

A model on torch's meta device has every shape and no content: it is built, run and optimised as the real one
is, and what that would keep is added up.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Muon
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from agentrl.algorithms.algorithm import Algorithm
from agentrl.learn.fused import CHUNK_NUMBERS
from agentrl.learn.lora import add_adapters
from agentrl.learn.optimizer import build_optimizers
from agentrl.learn.settings import LearnerConfig
from agentrl.learn.sharding import layers
from agentrl.policy.attention import packed_layout
from agentrl.policy.model import (
    context_length,
    output_weight,
    packed_forward,
    skeleton,
)
from agentrl.policy.settings import PolicyConfig
from agentrl.run.settings import RunConfig


def learned_skeleton(config: PolicyConfig) -> PreTrainedModel:
    """The policy that is learned, in float32 whatever the engine generates in; as `skeleton`."""
    return skeleton(replace(config, dtype="float32"))


def held_bytes(
    config: RunConfig, algorithm: Algorithm, learner: LearnerConfig, ranks: int = 1
) -> Mapping[str, tuple[int, str]]:
    """What one process holds on its device to learn in a stage: bytes, and how they were found, by what of.

    Args:
        config: of the run.
        algorithm: of the stage.
        learner: of the stage.
        ranks: processes that learn together.
    """
    block, wanted, sharded = config.policy, algorithm.requires, learner.backend == "fsdp"
    model = _learned(learned_skeleton(block), learner)
    rounded = learner.resolve_compute_dtype(block.dtype).compute_dtype == "bfloat16"
    # Dealt out, the weights are rounded as they come together; else each product rounds what it multiplies.
    narrow = replace(block, dtype="bfloat16")
    computed = _learned(skeleton(narrow), learner) if rounded and sharded else model
    share = ranks if sharded else 1
    dealt = f", dealt out to {share} processes" if share > 1 else ""
    parameters, trained = (_count(model, trained=only) for only in (False, True))
    weights = weight_bytes(model)
    states, whole = optimizer_bytes(model, learner, value_head(model, algorithm))
    tokens = max(learner.micro_batch_tokens, context_length(model, config.policy.max_context))
    found = {
        "weights": (weights // share, f"{parameters:,} parameters in float32{dealt}"),
        "gradients": (weight_bytes(model, trained=True) // share, f"of {trained:,} parameters{dealt}"),
        "optimiser": (states // share + whole, f"{learner.optimizer}{dealt}"),
        "reference": (
            weight_bytes(learned_skeleton(block)) // share * ("reference" in wanted),
            f"weights that do not change{dealt}",
        ),
        "activations": (
            activation_bytes(
                computed,
                tokens,
                recomputed=learner.recompute_activations,
                rounded=rounded and not sharded,
            ),
            f"a pass of {tokens:,} tokens",
        ),
        "logits": (logits_bytes(computed, tokens), "a chunk of tokens, and their gradient"),
        "weights that generate": (
            weight_bytes(skeleton(block)) * learns_apart(config, learner),
            f"those that the engine reads, in {block.dtype}, whole in every process",
        ),
        "weights of two layers": (layer_bytes(computed) * sharded, "whole while they are used"),
    }
    return {what: (size, how) for what, (size, how) in found.items() if size}


def learns_apart(config: RunConfig, learner: LearnerConfig) -> bool:
    """Whether what is learned is a copy of the weights that generate."""
    overlapping = config.trainer.mode == "async" and learner is config.learner  # cloning plays nothing
    rounded = config.policy.dtype != "float32"
    return learner.backend == "fsdp" or learner.lora is not None or overlapping or rounded


def generation_bytes(config: RunConfig, sequences: int) -> tuple[int, str]:
    """The cache of an engine `torch` with so many episodes in flight, and how it was found.

    A pass gathers the keys and values of one layer once more. Where episodes branch, those that wait to be
    branched from are kept as well.
    """
    model = skeleton(config.policy)
    branching = config.algorithm.build().rollout.branch_policy is not None
    sequences, context = sequences * (2 if branching else 1), context_length(model, config.policy.max_context)
    whole = cache_bytes(model, sequences, context)
    depth: int = model.config.get_text_config().num_hidden_layers
    return whole + whole // depth, f"{sequences} sequences of {context:,} tokens, and a layer of them twice"


def _learned(model: PreTrainedModel, learner: LearnerConfig) -> PreTrainedModel:
    """A skeleton with what is learned beside its weights."""
    if learner.lora is not None:
        add_adapters(model, learner.lora)
    return model


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)


def checkpoint_bytes(config: RunConfig, algorithm: Algorithm, learner: LearnerConfig) -> int:
    """Of a checkpoint in a stage."""
    model = _learned(learned_skeleton(config.policy), learner)
    reference = weight_bytes(learned_skeleton(config.policy)) * ("reference" in algorithm.requires)
    states = sum(optimizer_bytes(model, learner, value_head(model, algorithm)))
    return weight_bytes(model) + reference + states


def value_head(model: PreTrainedModel, algorithm: Algorithm) -> nn.Module | None:
    """The one that the learner adds, if the algorithm asks for values."""
    if "values" not in algorithm.requires:
        return None
    return nn.Linear(output_weight(model).shape[1], 1, device="meta", dtype=output_weight(model).dtype)


def weight_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Of all parameters, or only of those that are trained and so have gradients; shared ones count once."""
    return _bytes(value for value in model.parameters() if value.requires_grad or not trained)


def optimizer_bytes(
    model: nn.Module, config: LearnerConfig, value_head: nn.Module | None = None
) -> tuple[int, int]:
    """Of what the optimisers remember after their first step.

    Returns:
        Bytes that ranks can deal out among them, and bytes that each of them holds whole: those of Muon.
    """
    dealt = whole = 0
    for optimizer in build_optimizers(model, config, value_head):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if isinstance(optimizer, Muon):  # a momentum; to step would orthogonalise what is not there
            whole += _bytes(parameters)
            continue
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        states = optimizer.state.values()
        dealt += _bytes(value for state in states for value in state.values() if isinstance(value, Tensor))
    return dealt, whole


def layer_bytes(model: nn.Module) -> int:
    """Of what is whole at a time where the weights are dealt out: two layers, and all that is in none."""
    sizes = [weight_bytes(layer) for layer in layers(model)]
    return weight_bytes(model) - sum(sizes) + 2 * max(sizes, default=0)


def cache_bytes(model: PreTrainedModel, sequences: int, length: int) -> int:
    """Of the keys and values of `sequences` of `length` tokens."""
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    stored = getattr(settings, "num_key_value_heads", None) or heads
    numbers: int = 2 * settings.num_hidden_layers * stored * width * sequences * length
    return numbers * output_weight(model).element_size()


def activation_bytes(
    model: PreTrainedModel, tokens: int, *, recomputed: bool = False, rounded: bool = False
) -> int:
    """Of what a forward pass of so many tokens keeps for the way back; up to a seventh too much.

    The tokens are counted as sequences of one: attention then keeps what a fused kernel does, and nothing
    that grows with the square of a length. Rows of unequal length are padded within attention, which is not
    counted.

    Args:
        model: from `skeleton`.
        tokens: of the pass.
        recomputed: only the input of each layer is kept, and one layer at a time has the rest.
        rounded: products and attention are computed in bfloat16, from copies of weights in float32.
    """
    with _Bfloat16Products() if rounded else nullcontext():
        kept = _kept_bytes(model, tokens)
    if not recomputed:
        return kept
    depth: int = model.config.get_text_config().num_hidden_layers
    return (
        depth * tokens * output_weight(model).shape[1] * output_weight(model).element_size() + kept // depth
    )


class _Bfloat16Products(TorchFunctionMode):
    """Rounds what autocast would, which torch does not offer for tensors without content."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.scaled_dot_product_attention):
            args = [value.bfloat16() if isinstance(value, Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


def _kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = value
        return value

    lengths = torch.ones(tokens, dtype=torch.int64)
    device = output_weight(model).device
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        packed_forward(model, torch.empty_like(lengths, device=device), packed_layout(lengths, device))
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def logits_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Of the logits of one chunk on the way back, and of the gradient that they give the output embedding."""
    weight = output_weight(model)
    chunk = min(tokens, max(1, CHUNK_NUMBERS // len(weight)))
    narrow = weight.element_size() if weight.element_size() < 4 else 0
    return chunk * len(weight) * (2 * 4 + narrow) + _bytes([weight])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)
