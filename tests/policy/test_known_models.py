"""Accepted architectures, which depend on what they compute and not on their current weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from agentrl.errors import CheckpointError, RequirementError
from agentrl.policy import architecture
from agentrl.policy.architecture import called_linear_layers, probe_copy, without_weights
from agentrl.policy.attention import PackedLayout
from agentrl.policy.model import check_packed_forward, load_policy, output_weight, save_policy

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
FEW = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
TAKEN = [
    Qwen2Config(**SIZES),
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    SmolLM3Config(**SIZES),
    Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=100, layer_types=SLIDING),
    Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    GraniteConfig(**SIZES, logits_scaling=1.0),
    Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=None),
]
REFUSED = [
    (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2), "conv"),
    (JambaConfig(**SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2), "a recurrent state"),
    (FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8), "hybrid"),
    (MambaConfig(vocab_size=300, hidden_size=32, state_size=8, num_hidden_layers=2), "linear_attention"),
    (Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None), "final_logit_softcapping=30.0"),
    (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None), "attn_logit_softcapping=50.0"),
    (Gemma3nTextConfig(**{**SIZES, "intermediate_size": [48] * 4}, head_dim=8, num_kv_shared_layers=2,
                       hidden_size_per_layer_input=8, vocab_size_per_layer_input=300, laurel_rank=4,
                       altup_num_inputs=2, layer_types=["sliding_attention", "full_attention"] * 2,
                       activation_sparsity_pattern=None), "num_kv_shared_layers=2"),
    (CohereConfig(**SIZES, logit_scale=0.25), "logit_scale=0.25"),
    (GraniteConfig(**SIZES, logits_scaling=3.0), "logits_scaling=3.0"),
    (GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
    (PhiConfig(**SIZES), "a bias in its output layer"),
    (StableLmConfig(**SIZES), "needs its own mask or attention"),
    (GPTJConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4, rotary_dim=8), "its own mask or attention"),
]  # fmt: skip


def _named(value: Any) -> str:
    return f"{value.model_type}-{value.num_hidden_layers}" if isinstance(value, PreTrainedConfig) else ""


@pytest.mark.parametrize("config", TAKEN, ids=_named)
def test_plain_attention_and_a_linear_head_are_taken_at_spread_weights(config: PreTrainedConfig) -> None:
    assert check_packed_forward(without_weights(config)) < 1e-4


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=_named)
def test_what_does_more_is_refused_before_it_has_weights(config: PreTrainedConfig, words: str) -> None:
    with pytest.raises(RequirementError, match=words):
        check_packed_forward(without_weights(config))


@pytest.mark.parametrize("config", [REFUSED[0][0], REFUSED[4][0], REFUSED[6][0], REFUSED[8][0]], ids=_named)
def test_the_numbers_alone_refuse_it_too(config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caps and scales of these models matter only at widely spread weights, not at weights of 0.02."""
    monkeypatch.setattr(architecture, "_unsupported_features", lambda model: iter(()))
    with pytest.raises(RequirementError, match="gives other logprobs over packed sequences"):
        check_packed_forward(without_weights(config))


def test_a_window_that_attention_ignores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PackedLayout.attend
    monkeypatch.setattr(PackedLayout, "attend", lambda self, *given: attend(self, *given[:5], None))
    assert check_packed_forward(without_weights(TAKEN[0])) < 1e-4
    with pytest.raises(RequirementError, match="gives other logprobs"):
        check_packed_forward(without_weights(TAKEN[3]))


def test_the_answer_depends_on_no_weights_and_leaves_the_generators_alone() -> None:
    model = AutoModelForCausalLM.from_config(TAKEN[0])
    state = torch.random.get_rng_state()
    found = check_packed_forward(model)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(torch.nan)
    assert check_packed_forward(model.to(torch.bfloat16)) == found
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_copy_has_every_kind_of_layer_and_is_narrow_between_them() -> None:
    deep = {**SIZES, "num_hidden_layers": 40, "vocab_size": 50_000, "intermediate_size": 4000}
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 6 + ["sliding_attention"] * 4
    config = Gemma3TextConfig(**deep, head_dim=8, layer_types=kinds, sliding_window=100)
    copied = probe_copy(without_weights(config))
    assert copied.config.layer_types == kinds[:6]
    assert copied.config.sliding_window == 6
    assert copied.base_model.layers[0].mlp.up_proj.weight.shape == (64, 32)
    assert output_weight(copied).shape == (128, 32)
    assert (config.num_hidden_layers, config.sliding_window) == (40, 100)
    assert len(probe_copy(without_weights(LlamaConfig(**deep))).base_model.layers) == 2


# The weights of a folder.


def _saved(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, scale: float) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    save_policy(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("index", [1, 3], ids=["llama", "gemma3"])
def test_a_folder_is_taken_in_low_precision_however_far_its_tail_reaches(
    dtype: str, index: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = TAKEN[index].__class__.from_dict(TAKEN[index].to_dict() | {"vocab_size": len(tokenizer)})
    folder = _saved(config, tokenizer, tmp_path / "model", 200.0)
    model, _ = load_policy(folder, device="cpu", dtype=dtype)
    assert output_weight(model).dtype == getattr(torch, dtype)
    tokens = torch.arange(3, 14)
    with torch.no_grad():
        own = model(tokens[None]).logits[0].float().log_softmax(-1)
    assert own.min() < -64  # from there on, neighbours in bfloat16 are 0.5 nats apart


def test_weights_that_are_no_numbers_are_called_that(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.base_model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    for part in (model, tokenizer):  # `save_policy` would refuse them
        part.save_pretrained(tmp_path / "model")
    words = (
        r"model holds values that are not finite: model\.layers\.1\.mlp\.down_proj\.weight, read as float32"
    )
    with pytest.raises(CheckpointError, match=words):
        load_policy(tmp_path / "model", device="cpu")


def test_numbers_that_float16_cannot_hold_are_called_that(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    save_policy(model, tokenizer, tmp_path / "model")
    load_policy(tmp_path / "model", device="cpu", dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight, read as float16; bfloat16 and float32 hold"):
        load_policy(tmp_path / "model", device="cpu", dtype="float16")


def test_logits_that_float16_cannot_hold_are_called_that(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.base_model.norm.weight.fill_(6e4)
        output_weight(model).fill_(10.0)
        output_weight(model)[::2] = -10.0
    save_policy(model, tokenizer, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"the logits are not in policy\.dtype=float16"):
        load_policy(tmp_path / "model", device="cpu", dtype="float16")


def test_an_architecture_is_refused_before_its_weights_are_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = GraniteConfig(**{**SIZES, "vocab_size": len(tokenizer)}, logits_scaling=3.0)
    folder = _saved(config, tokenizer, tmp_path / "model", 1.0)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(RequirementError, match="a scale on its logits"):
        load_policy(folder, device="cpu")


# What adapters may be offered for.


def test_the_maps_of_all_layers_are_called_and_the_output_layer_is_not() -> None:
    called = called_linear_layers(without_weights(LlamaConfig(**SIZES)))
    maps = {name.rpartition(".")[2] for name in called}
    assert maps == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(called) == 4 * 7
    assert called_linear_layers(without_weights(TAKEN[5])) == set()  # GPT-2 has no linear map but its head
