"""How long a sequence may be: by positions, by windows, and by rotary angles that depend on the length."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from agentrl.errors import ConfigError, RequirementError
from agentrl.policy import context
from agentrl.policy.architecture import without_weights
from agentrl.policy.attention import PACKED
from agentrl.policy.context import context_length, context_limit, shortened
from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams
from agentrl.policy.packed import hidden_states, output_weight
from agentrl.policy.torch_engine import TorchEngine

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
SWITCH = 24


def _llama(**rope: Any) -> PreTrainedConfig:
    return LlamaConfig(**SIZES, max_position_embeddings=96, rope_parameters={"rope_theta": 1e4, **rope})


LONGROPE = Phi3Config(
    **SIZES,
    max_position_embeddings=96,
    original_max_position_embeddings=SWITCH,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 3.0, 9.0, 20.0],
        "original_max_position_embeddings": SWITCH,
    },
)
LIMITS = [
    (_llama(rope_type="default"), 96),
    (_llama(rope_type="dynamic", factor=4.0), 96),  # its frequencies change beyond its positions only
    (_llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=SWITCH), 96),
    (LONGROPE, SWITCH),
    (GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40), 40),
    (MistralConfig(**SIZES, max_position_embeddings=96, sliding_window=8), 8),
    (MistralConfig(**SIZES, max_position_embeddings=96, sliding_window=None), 96),
    (Qwen2Config(**SIZES, max_position_embeddings=96, use_sliding_window=True, sliding_window=8,
                 max_window_layers=3), 96),
    (Gemma3TextConfig(**SIZES, max_position_embeddings=96, head_dim=8, sliding_window=8,
                      layer_types=SLIDING), 96),
    (Gemma3TextConfig(**SIZES, max_position_embeddings=96, head_dim=8, sliding_window=8,
                      layer_types=SLIDING[:1] * 4), 8),
]  # fmt: skip


@pytest.mark.parametrize(("config", "limit"), LIMITS, ids=lambda value: getattr(value, "model_type", ""))
def test_a_limit_follows_from_the_configuration_with_and_without_weights(
    config: PreTrainedConfig, limit: int
) -> None:
    assert context_limit(without_weights(config)) == limit
    assert context_limit(_model(config)) == limit


def test_what_is_wanted_is_used_up_to_the_limit_and_the_rest_is_told() -> None:
    model = without_weights(LIMITS[4][0])
    assert [context_length(model, wanted) for wanted in (None, 39, 40, 41)] == [40, 39, 40, 40]
    assert shortened(model, 40) is None
    assert shortened(model, 41) == (
        "policy.max_context=41, but a sequence of GPT2LMHeadModel (made from scratch) holds at most 40 "
        "tokens: 40 is used"
    )
    assert "at most 8 tokens, its window in every layer: 8 is used" in str(
        shortened(without_weights(LIMITS[5][0]), 9)
    )


def test_more_than_the_rotary_switch_is_refused_with_the_largest_right_value() -> None:
    model = without_weights(LONGROPE)
    assert [context_length(model, wanted) for wanted in (None, 10, SWITCH)] == [SWITCH, 10, SWITCH]
    with pytest.raises(ConfigError, match=r"policy\.max_context is 25, wanted at most 24: Phi3ForCausalLM"):
        context_length(model, SWITCH + 1)
    with pytest.raises(ConfigError, match="wanted at most 24"):
        TorchEngine(_model(LONGROPE), stop_ids={1}, max_context=90)


def test_a_switch_is_found_by_any_name_and_in_any_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embedding that reads its positions differently, under another name."""
    config = Gemma3TextConfig(**SIZES, max_position_embeddings=96, head_dim=8, layer_types=SLIDING)
    model = without_weights(config)
    kind = type(model.base_model.rotary_emb)
    forward = kind.forward

    def stretched(self: Any, x: Tensor, positions: Tensor, layer_type: str) -> Any:
        long = layer_type == "full_attention" and positions.max() >= 50
        return forward(self, x, positions / 2 if long else positions, layer_type)

    monkeypatch.setattr(kind, "forward", stretched)
    assert context_limit(model) == 50


def test_a_rotary_embedding_that_cannot_be_asked_is_taken_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unwilling(*given: Any, **named: Any) -> None:
        raise TypeError("wanted three positions for each token")

    models = [without_weights(config) for config in (LONGROPE, LIMITS[0][0])]
    for model in models:
        monkeypatch.setattr(type(model.base_model.rotary_emb), "forward", unwilling)
    assert [context_limit(model) for model in models] == [SWITCH, 96]


def test_a_limit_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_weights(LONGROPE)
    assert context_limit(model) == SWITCH
    monkeypatch.setattr(context, "_rotary_switch", None)
    assert context_length(model, 12) == 12


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED).eval()


def _own_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    model.set_attn_implementation(PACKED)
    return logits.log_softmax(-1)


def _logprobs(model: PreTrainedModel, *rows: Sequence[int]) -> Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([token for row in rows for token in row]), lengths)
        return (hidden @ output_weight(model).T).log_softmax(-1)


@pytest.mark.parametrize(
    "config", [LONGROPE, LIMITS[1][0], LIMITS[4][0]], ids=lambda config: config.model_type
)
def test_up_to_the_limit_engine_learner_and_library_agree_and_neighbours_change_nothing(
    config: PreTrainedConfig,
) -> None:
    model = _model(config)
    limit = context_limit(model)
    engine = TorchEngine(model, stop_ids={60})
    prompts = {"short": (5, 6, 7), "long": tuple(place % 50 + 2 for place in range(limit - 8))}
    for name, prompt in prompts.items():
        sampling = SamplingParams(temperature=1.0, max_tokens=limit)
        engine.submit(GenerationRequest(name, prompt, True, None, 3, sampling))
    done: dict[str, Generation] = {}
    while len(done) < 2:
        done.update((reply.sequence, reply) for reply in engine.step())
    rows = [(*prompts[name], *done[name].token_ids) for name in prompts]
    assert max(len(row) for row in rows) == limit  # replies were drawn until nothing more fitted
    for row, reply in zip(rows, (done["short"], done["long"]), strict=True):
        begin = len(row) - len(reply.token_ids)
        own = _own_logprobs(model, row)
        for place, logprob in enumerate(reply.logprobs, begin):
            assert logprob == pytest.approx(own[place - 1, row[place]].item(), abs=1e-4)
    both, alone = _logprobs(model, *rows), [_logprobs(model, row) for row in rows]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(alone[1], _own_logprobs(model, rows[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [LONGROPE, LIMITS[4][0]], ids=lambda config: config.model_type)
def test_a_sequence_beyond_the_limit_is_refused_and_not_read_differently(config: PreTrainedConfig) -> None:
    model = _model(config)
    limit = context_limit(model)
    with pytest.raises(RequirementError, match=f"set policy.max_context to {limit} or less"):
        _logprobs(model, (1, 2, 3), [4] * (limit + 1))
