"""Memory of a policy and its learner, counted before their weights exist.

A model on torch's meta device has all shapes and no content. It is built, run and optimised as the real one
is, and the sizes of the tensors that this keeps are added up.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Muon
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.token_statistics import (
    current_statistics,
    numbers_per_token,
    reads_teacher,
    scored_statistics,
)
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
from agentrl.run.teachers import teacher_dtype, teacher_skeleton


def learner_skeleton(config: PolicyConfig) -> PreTrainedModel:
    """Return the skeleton of the policy that is learned, which is in float32 whatever `policy.dtype` is."""
    return skeleton(replace(config, dtype="float32"))


def learner_bytes(
    config: RunConfig,
    algorithm: Algorithm,
    learner: LearnerConfig,
    ranks: int = 1,
    *,
    batch_tokens: int | None = None,
) -> Mapping[str, tuple[int, str]]:
    """Return the bytes that one rank holds on its device to learn in a stage, and how they were found.

    Args:
        config: The configuration of the run.
        algorithm: The algorithm of the stage.
        learner: The configuration of the learner in the stage.
        ranks: The number of processes that learn together.
        batch_tokens: The number of tokens that a rank learns from in a step, if that is known.

    Returns:
        The bytes and their derivation in words, by what they are for.
    """
    block, wanted, sharded = config.policy, algorithm.requires, learner.backend == "fsdp"
    model = _with_adapters(learner_skeleton(block), learner)
    rounded = learner.resolve_compute_dtype(block.dtype).compute_dtype == "bfloat16"
    # FSDP rounds weights as it gathers them; without it, each product rounds its own operands.
    narrow = replace(block, dtype="bfloat16")
    computed = _with_adapters(skeleton(narrow), learner) if rounded and sharded else model
    parts = ranks if sharded else 1
    dealt = f", dealt out to {parts} processes" if parts > 1 else ""
    parameters, trained = (_count(model, trained=only) for only in (False, True))
    weights = weight_bytes(model)
    states, undivided = optimizer_bytes(model, learner, value_head(model, algorithm))
    tokens = max(learner.micro_batch_tokens or 0, context_length(model, config.policy.max_context))
    tokens = tokens if batch_tokens is None else min(tokens, batch_tokens)
    found = {
        "weights": (weights // parts, f"{parameters:,} parameters in float32{dealt}"),
        "gradients": (weight_bytes(model, trained=True) // parts, f"of {trained:,} parameters{dealt}"),
        "optimiser": (states // parts + undivided, f"{learner.optimizer}{dealt}"),
        "reference": (
            weight_bytes(learner_skeleton(block)) // parts * ("reference" in wanted),
            f"weights that do not change{dealt}",
        ),
        **teacher_bytes(config, algorithm, learner, parts, tokens),
        "reward model": (
            reward_model_bytes(block, algorithm, gradients=True) // parts,
            f"weights, gradients and AdamW of a second model of the policy's size{dealt}",
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
        "token statistics": statistics_bytes(
            config, algorithm, learner, context_length(model, config.policy.max_context)
        ),
        "weights that generate": (
            weight_bytes(skeleton(block)) * keeps_learner_copy(config, learner),
            f"those that the engine reads, in {block.dtype}, whole in every process",
        ),
        "weights of two layers": (layer_bytes(computed) * sharded, "whole while they are used"),
    }
    return {what: (size, how) for what, (size, how) in found.items() if size}


def teacher_bytes(
    config: RunConfig, algorithm: Algorithm, learner: LearnerConfig, parts: int, tokens: int
) -> dict[str, tuple[int, str]]:
    """Return the bytes of the teacher and of a pass of it, which keeps no activations, and how found.

    Args:
        config: The configuration of the run.
        algorithm: The algorithm of the stage.
        learner: The configuration of the learner in the stage.
        parts: The number of processes that the weights are dealt out to.
        tokens: The number of tokens of a pass.
    """
    if learner.teacher is None or not reads_teacher(algorithm.requires):
        return {}
    model = teacher_skeleton(config)
    count, dtype = _count(model, trained=False), teacher_dtype(config)
    dealt = f", dealt out to {parts} processes" if parts > 1 else ""
    weight, depth = output_weight(model), 4  # the states of a layer, its input, and those of its MLP
    states = depth * tokens * weight.shape[1] * weight.element_size()
    gathered = layer_bytes(model) * (parts > 1)
    return {
        "teacher": (weight_bytes(model) // parts, f"{count:,} parameters in {dtype}{dealt}"),
        "a pass of the teacher": (
            states + min(tokens * len(weight), CHUNK_NUMBERS) * 2 * 4 + gathered,
            f"{tokens:,} tokens without gradient, and a chunk of logits",
        ),
    }


def episodes_per_step(config: RunConfig, algorithm: Algorithm) -> int:
    """Return the number of episodes that a training step collects."""
    return config.rollout.groups_per_step * (algorithm.rollout.episodes or config.rollout.group_size)


def statistics_bytes(
    config: RunConfig, algorithm: Algorithm, learner: LearnerConfig, context: int
) -> tuple[int, str]:
    """Return the bytes of the required statistics of each token, such as `topk:10`, and how they were found.

    Every rank holds those of the whole rollout batch, and those of a mini-batch, which are selected from them
    or computed under the current policy. Episodes are counted as sequences of the full context.
    """
    episodes = episodes_per_step(config, algorithm)
    scored, current = (
        numbers_per_token(of(algorithm.requires)) for of in (scored_statistics, current_statistics)
    )
    scored += algorithm.view is not None  # the divergence under changed observations
    size = scored * episodes + max(scored, current) * -(-episodes // learner.mini_batches)
    told = (
        f"{max(scored, current)} numbers a token of {episodes} sequences of {context:,}, and of a mini-batch"
    )
    return 4 * context * size, told


def keeps_learner_copy(config: RunConfig, learner: LearnerConfig) -> bool:
    """Return whether the learner trains a copy of the weights that the engine reads."""
    overlapping = config.trainer.mode == "async" and learner is config.learner  # cloning collects no episodes
    rounded = config.policy.dtype != "float32"
    return learner.backend == "fsdp" or learner.lora is not None or overlapping or rounded


def generation_bytes(config: RunConfig, sequences: int, length: int | None = None) -> tuple[int, str]:
    """Return the bytes of the torch engine's cache, and how they were found.

    A pass copies the keys and values of one layer. Where episodes branch, those that may still be branched
    from are kept as well.

    Args:
        config: The configuration of the run.
        sequences: The number of episodes in flight.
        length: The number of tokens that their sequences reach; None takes the context.
    """
    model = skeleton(config.policy)
    branching = config.algorithm.build().rollout.branch_policy is not None
    sequences, context = sequences * (2 if branching else 1), context_length(model, config.policy.max_context)
    context = context if length is None else min(length, context)
    whole = cache_bytes(model, sequences, context)
    depth: int = model.config.get_text_config().num_hidden_layers
    return whole + whole // depth, f"{sequences} sequences of {context:,} tokens, and a layer of them twice"


def _with_adapters(model: PreTrainedModel, learner: LearnerConfig) -> PreTrainedModel:
    """Add the adapters of the learner, if it trains any, to the model and return it."""
    if learner.lora is not None:
        add_adapters(model, learner.lora)
    return model


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)


def checkpoint_bytes(config: RunConfig, algorithm: Algorithm, learner: LearnerConfig) -> int:
    """Return the bytes of a checkpoint in a stage, without what it shares with others: the reference."""
    model = _with_adapters(learner_skeleton(config.policy), learner)
    states = sum(optimizer_bytes(model, learner, value_head(model, algorithm)))
    return learned_bytes(config, learner) + states + reward_model_bytes(config.policy, algorithm)


def learned_bytes(config: RunConfig, learner: LearnerConfig) -> int:
    """Return the bytes of what a stage saves of the policy: its adapters, or else all of its weights."""
    model = _with_adapters(learner_skeleton(config.policy), learner)
    return weight_bytes(model, trained=learner.lora is not None)


def sent_bytes(config: RunConfig) -> tuple[int, str]:
    """Return the bytes that vLLM is sent after each training step, and what they are."""
    model = skeleton(config.policy)
    weights, number = weight_bytes(model), output_weight(model).element_size()
    if config.learner.lora is None:
        return weights, "all weights"
    if not config.engine.takes_adapters:
        why = "engine.vllm.lora=merged" if config.engine.vllm.lora == "merged" else "they go by NCCL"
        return weights, f"all weights, with adapters merged into them: {why}"
    adapters = _count(_with_adapters(model, config.learner), trained=True) * number
    once = f"the frozen weights, {decimal(weights)}, go once"
    return adapters, f"adapters alone; {once}: engine.vllm.lora=adapter"


def shared_bytes(config: RunConfig, algorithm: Algorithm, learner: LearnerConfig) -> tuple[int, str]:
    """Return the bytes of frozen weights that a run keeps once, and what they are."""
    weights = weight_bytes(learner_skeleton(config.policy))
    if learner.lora is None:
        return weights * ("reference" in algorithm.requires), "the reference, once for all checkpoints"
    own = config.policy.path is None or (config.warm_start.steps > 0 and learner is config.learner)
    return weights * own, "what adapters are added to"


def value_head(model: PreTrainedModel, algorithm: Algorithm) -> nn.Module | None:
    """Return the value head that the learner adds if the algorithm requires values, else None."""
    if "values" not in algorithm.requires:
        return None
    return nn.Linear(output_weight(model).shape[1], 1, device="meta", dtype=output_weight(model).dtype)


def weight_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Return the bytes of the parameters, or of those that are trained; shared ones count once."""
    return _bytes(value for value in model.parameters() if value.requires_grad or not trained)


def optimizer_bytes(
    model: nn.Module, config: LearnerConfig, value_head: nn.Module | None = None
) -> tuple[int, int]:
    """Return the bytes of the optimizer states after the first step.

    Returns:
        The bytes that ranks divide among them, and the bytes that each rank holds in full, which are Muon's.
    """
    divided = full = 0
    for optimizer in build_optimizers(model, config, value_head):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if isinstance(optimizer, Muon):  # a momentum; its step cannot run without content
            full += _bytes(parameters)
            continue
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        states = optimizer.state.values()
        divided += _bytes(value for state in states for value in state.values() if isinstance(value, Tensor))
    return divided, full


def reward_model_bytes(block: PolicyConfig, algorithm: Algorithm, *, gradients: bool = False) -> int:
    """Return the bytes of the reward model that the learner trains, with AdamW's two states; 0 without one.

    Its passes come before those of the policy and need what these need, so they add no activations.

    Args:
        block: The policy, whose size it has.
        algorithm: The algorithm.
        gradients: Whether to add those of its gradients.
    """
    if algorithm.reward_model is None:
        return 0
    return weight_bytes(learner_skeleton(block)) * (4 if gradients else 3)


def layer_bytes(model: nn.Module) -> int:
    """Return the bytes that FSDP gathers at a time: two layers, and the parameters outside all layers."""
    sizes = [weight_bytes(layer) for layer in layers(model)]
    return weight_bytes(model) - sum(sizes) + 2 * max(sizes, default=0)


def cache_bytes(model: PreTrainedModel, sequences: int, length: int) -> int:
    """Return the bytes of the keys and values of `sequences` of `length` tokens."""
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    stored = getattr(settings, "num_key_value_heads", None) or heads
    numbers: int = 2 * settings.num_hidden_layers * stored * width * sequences * length
    return numbers * output_weight(model).element_size()


def activation_bytes(
    model: PreTrainedModel, tokens: int, *, recomputed: bool = False, rounded: bool = False
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass; up to a seventh too many.

    The tokens are counted as sequences of one token: attention then keeps as much as a fused kernel does, and
    nothing that grows with the square of a length. The padding of attention between sequences of unequal
    length is not counted.

    Args:
        model: The model, from `skeleton`.
        tokens: The number of tokens in the pass.
        recomputed: Whether only the input of each layer is kept, and the rest for one layer at a time.
        rounded: Whether products and attention are computed in bfloat16, from copies of float32 weights.
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
    """Round what autocast would, which torch does not offer on the meta device."""

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
    """Return the bytes of a chunk of logits in the backward pass and of the output embedding's gradient."""
    weight = output_weight(model)
    chunk = min(tokens, max(1, CHUNK_NUMBERS // len(weight)))
    narrow = weight.element_size() if weight.element_size() < 4 else 0
    return chunk * len(weight) * (2 * 4 + narrow) + _bytes([weight])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)
