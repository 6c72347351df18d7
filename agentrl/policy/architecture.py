"""Check that an architecture can run over packed sequences; needs none of its weights."""

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from agentrl.errors import RequirementError
from agentrl.policy.attention import PACKED, Array, KVCache, cached_layout
from agentrl.policy.context import context_limit
from agentrl.policy.packed import hidden_states, output_layer, output_weight, packed_forward

TOLERANCE = 1e-3  # nats, for a likely token's logprob; a wrong mask, position or scale moves it by tenths
LIKELY = 1e-3  # the probability below which logprobs are not compared
_LENGTHS = (23, 9, 14)
_WINDOW = 6  # the copy's sliding window, shorter than its sequences so that it hides something
_WIDTH = 64  # the largest width of the copy's MLPs
_VOCABULARY = 128
_KINDS = ("full_attention", "sliding_attention")
_REMEDY = "use a model with causal attention and a linear head, such as Qwen2, Qwen3, Llama or Gemma 3"
# Features that packed attention, or an output layer that is one matrix, lacks: key of config.json -> (values
# that turn it off, its name). Other features show as a difference in the logprobs.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attn_logit_softcapping": ((None, 0), "a soft cap on its attention scores"),
    "final_logit_softcapping": ((None, 0), "a soft cap on its logits"),
    "logit_scale": ((None, 1), "a scale on its logits"),
    "logits_scaling": ((None, 1), "a scale on its logits"),
    "lm_head_multiplier": ((None, 1), "a scale on its logits"),
    "hidden_size_per_layer_input": ((None, 0), "embeddings that enter at every layer"),
    "num_kv_shared_layers": ((None, 0), "layers that share their keys and values"),
    "use_bidirectional_attention": ((None, False), "attention to later tokens"),
    "is_encoder_decoder": ((None, False), "an encoder"),
}


def check_packed_forward(model: PreTrainedModel) -> float:
    """Refuse a model that packed attention and a single output matrix cannot compute exactly.

    First its configuration is searched for unsupported features: kinds of layers, soft caps and scales. Then
    packed and cached forward passes are compared with the library's own pass over each sequence, beyond the
    sliding window. These run on a small copy: the fewest layers that include every kind, narrow where nothing
    depends on the width, with float32 weights spread so widely that every nonlinearity acts. So the result
    depends on the architecture alone, not on the values or the dtype of the weights; it costs little beside a
    large model, and a model on the meta device works too.

    Returns:
        The largest difference of a likely token's logprob, in nats.

    Raises:
        RequirementError: Naming what is not supported.
    """
    reasons = list(_unsupported_features(model))
    if reasons:
        raise RequirementError(
            f"{_name(model)} has {', '.join(reasons)}, so it would give other logprobs over packed "
            f"sequences than by itself; {_REMEDY}"
        )
    copied = probe_copy(model)
    lengths = np.minimum(_LENGTHS, context_limit(copied))
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(len(output_weight(copied)), (int(size),), generator=draw) for size in lengths]
    try:
        with torch.inference_mode():
            own = _own_logprobs(copied, rows)
            packed = _logprobs(copied, hidden_states(copied, torch.cat(rows), torch.from_numpy(lengths)))
            cached = _logprobs(copied, _cached_states(copied, rows, lengths))
    except Exception as error:  # models may raise anything
        raise _cannot_run(model, error) from error
    likely = own > np.log(LIKELY)
    worst = max(float((own - other)[likely].abs().max()) for other in (packed, cached))
    if not worst <= TOLERANCE:
        raise RequirementError(
            f"{_name(model)} gives other logprobs over packed sequences than by itself (largest difference "
            f"of a likely token {worst:.3g} nats, wanted at most {TOLERANCE:g}); {_REMEDY}"
        )
    return worst


def without_weights(settings: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on torch's meta device: every shape and no content.

    Raises:
        RequirementError: If the architecture's attention cannot be replaced.
    """
    kind = cast(Any, AutoModelForCausalLM)
    with torch.device("meta"):
        try:
            made = kind.from_config(copy.deepcopy(settings), attn_implementation=PACKED)
        except Exception as error:
            raise _cannot_run(kind.from_config(settings), error) from error
    return cast(PreTrainedModel, made)


def called_linear_layers(model: PreTrainedModel) -> set[str]:
    """Return the names of the linear layers that a packed forward pass calls as modules.

    A layer of which the pass reads only the weight is left out. The calls are observed on a small copy, see
    `check_packed_forward`; a linear layer of one decoder layer or expert stands for those of all others.
    """
    copied = probe_copy(model)
    called: set[str] = set()
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.add(_without_indices(name)))
    length = min(_VOCABULARY, context_limit(copied))
    with torch.no_grad():
        hidden_states(copied, torch.arange(length) % len(output_weight(copied)), torch.tensor([length]))
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _without_indices(name) in called
    }


def _without_indices(name: str) -> str:
    """Replace list indices in a module's name: model.layers.3.mlp becomes model.layers.*.mlp."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _unsupported_features(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of known features that packed attention or a single output matrix lacks."""
    head = output_layer(model)
    if not isinstance(getattr(head, "weight", None), Tensor):
        yield "no output layer made of one matrix"
    elif getattr(head, "bias", None) is not None:
        yield "a bias in its output layer"
    config = model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(_KINDS))
    if kinds:
        yield f"layers of other kinds than full or sliding attention ({', '.join(kinds)})"
    recurrent = sorted(
        {
            type(part).__name__
            for part in _decoder(model).modules()
            if isinstance(part, nn.RNNBase | nn.Conv1d)
        }
    )
    if recurrent or getattr(model, "_is_stateful", False):
        yield f"layers with a recurrent state ({', '.join(recurrent) or 'stateful'})"
    for key, (neutral, words) in _UNSUPPORTED.items():
        value = getattr(config, key, None)
        if value not in neutral:
            yield f"{words} ({key}={value})"


def probe_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Build a small float32 model of the same architecture on the CPU, with widely spread weights.

    The global random generators are left unchanged.
    """
    problem: Exception | None = None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for config in (_smaller(model), _as_it_is(model)):
            try:
                copied = cast(PreTrainedModel, cast(Any, type(model))(config))
                copied.set_attn_implementation(PACKED)
                break
            except Exception as error:  # for example, sizes that contradict each other
                problem = error
        else:
            assert problem is not None
            raise _cannot_run(model, problem) from problem
    _randomize_weights(copied)
    return cast(PreTrainedModel, cast(nn.Module, copied).float().eval().requires_grad_(False))


def _as_it_is(model: PreTrainedModel) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(_WINDOW, text.sliding_window)
    return config


def _smaller(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a configuration with fewer layers, but of all kinds, a small vocabulary and narrow MLPs."""
    config = _as_it_is(model)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    kept = _layers_of_all_kinds(model)
    for key, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, key, value[:kept])
    text.num_hidden_layers = kept
    config.tie_word_embeddings = text.tie_word_embeddings = False  # tied ones predict each token from itself
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, key, None) is not None:
            setattr(text, key, 0)
    for key, value in vars(text).items():
        if key.endswith("intermediate_size") and isinstance(value, int):
            setattr(text, key, min(value, _WIDTH))
    return config


def _layers_of_all_kinds(model: PreTrainedModel) -> int:
    """Return how many of the first layers include every kind; kinds differ in structure or settings."""
    depth: int = model.config.get_text_config().num_hidden_layers
    for part in _decoder(model).modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            kinds = [_layer_signature(layer) for layer in part]
            return max(2, 1 + max(kinds.index(kind) for kind in kinds)) if depth > 1 else depth
    return depth


def _layer_signature(layer: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, type(part), _settings(part), tuple(value.shape for value in part.parameters(recurse=False)))
        for name, part in layer.named_modules()
    )


def _settings(part: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (key, value)
        for key, value in sorted(vars(part).items())
        if isinstance(value, bool | int | float | str | None) and key not in ("layer_idx", "training")
    )


def _decoder(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, cast(Any, model).get_decoder())


def _randomize_weights(model: PreTrainedModel) -> None:
    """Draw matrices that double the norm of their input, and add noise to all other weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() > 1:
                value.copy_(noise * 2 / value.shape[-1] ** 0.5)
            else:
                value.add_(noise * 0.3)


def _cannot_run(model: PreTrainedModel, error: Exception) -> RequirementError:
    words = " ".join(str(error).split())[:300]
    if not isinstance(error, RequirementError):
        words = f"its code needs its own mask or attention ({type(error).__name__}: {words})"
    return RequirementError(f"{_name(model)} cannot run over packed sequences: {words}; {_REMEDY}")


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.name_or_path or 'not from a folder'})"


def _own_logprobs(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    model.set_attn_implementation("eager")
    try:
        logits = [cast(Any, model)(input_ids=row.unsqueeze(0), use_cache=False).logits[0] for row in rows]
    finally:
        model.set_attn_implementation(PACKED)
    return torch.cat(logits).log_softmax(-1)


def _logprobs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return (hidden @ output_weight(model).T).log_softmax(-1)


def _cached_states(model: PreTrainedModel, rows: Sequence[Tensor], lengths: Array) -> Tensor:
    """Return hidden states computed through a cache, in chunks of a third, one token and the rest."""
    cache = KVCache()
    cache.reserve(len(rows), int(lengths.max()))
    states: list[list[Tensor]] = [[] for _ in rows]
    for begin, end in pairwise([0 * lengths, lengths // 3, lengths // 3 + 1, lengths]):
        layout = cached_layout(cache, np.arange(len(rows)), begin, end - begin, rows[0].device)
        chunks = [row[first:last] for row, first, last in zip(rows, begin, end, strict=True)]
        out = packed_forward(model, torch.cat(chunks), layout)
        for of_row, part in zip(states, torch.split(out, (end - begin).tolist()), strict=True):
            of_row.append(part)
    return torch.cat([torch.cat(of_row) for of_row in states])
