"""The packed forward against the library's own, which runs each sequence by itself."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from agentrl.errors import ConfigError, RequirementError
from agentrl.policy.attention import PACKED, KVCache, cached_layout, positions_within
from agentrl.policy.model import (
    build_model,
    check_packed_forward,
    context_limit,
    hidden_states,
    output_weight,
    packed_forward,
)
from agentrl.policy.settings import PolicyConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LENGTHS = (9, 3, 17, 1)
CONFIGS = [
    Qwen2Config(**SIZES),
    Qwen2Config(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    Qwen3Config(**SIZES, head_dim=24),
    LlamaConfig(**SIZES),
]


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED).eval()


def _batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor(LENGTHS)


def _own_logprobs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rows = [model(row[None], use_cache=False).logits[0].log_softmax(-1) for row in tokens.split(LENGTHS)]
    model.set_attn_implementation(before)
    return torch.cat(rows)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_ragged_sequences_get_the_logprobs_they_have_alone(config: PreTrainedConfig) -> None:
    model = _model(config)
    tokens, lengths = _batch()
    with torch.no_grad():
        packed = (hidden_states(model, tokens, lengths) @ output_weight(model).T).log_softmax(-1)
        torch.testing.assert_close(packed, _own_logprobs(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_ragged_sequences_give_the_gradients_they_give_alone(config: PreTrainedConfig) -> None:
    model = _model(config)
    tokens, lengths = _batch()
    picks = torch.randn(len(tokens), 61, generator=torch.Generator().manual_seed(2))

    def gradients(logprobs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((logprobs * picks).sum(), list(model.parameters())))

    own = gradients(_own_logprobs(model, tokens))
    packed = gradients((hidden_states(model, tokens, lengths) @ output_weight(model).T).log_softmax(-1))
    for ours, theirs in zip(packed, own, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = _model(CONFIGS[0]).train()
    tokens, lengths = _batch()
    plain = torch.autograd.grad(
        hidden_states(model, tokens, lengths).sin().sum(), model.base_model.layers[0].mlp.up_proj.weight
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(
        hidden_states(model, tokens, lengths).sin().sum(), model.base_model.layers[0].mlp.up_proj.weight
    )
    torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("slots", [(0, 1, 2, 3), (2, 5, 11, 30)], ids=["in place", "scattered"])
def test_chunks_of_any_length_continue_their_cache(config: PreTrainedConfig, slots: tuple[int, ...]) -> None:
    model = _model(config)
    tokens, _ = _batch()
    rows = tokens.split(LENGTHS)
    cache = KVCache()
    cache.reserve(4, 4)
    cache.reserve(31, 20)
    seen = [0, 0, 0, 0]
    hidden: list[list[Tensor]] = [[], [], [], []]
    with torch.no_grad():
        for take in ((4, 1, 2, 1), (1, 2, 1, 0), (4, 0, 14, 0)):
            active = [k for k in range(4) if take[k]]
            chunks = [rows[k][seen[k] : seen[k] + take[k]] for k in active]
            layout = cached_layout(
                cache,
                np.array([slots[k] for k in active]),
                np.array([seen[k] for k in active]),
                np.array([take[k] for k in active]),
                tokens.device,
            )
            out = packed_forward(model, torch.cat(chunks), layout)
            for k, part in zip(active, out.split([len(chunk) for chunk in chunks]), strict=True):
                hidden[k].append(part)
                seen[k] += take[k]
        assert tuple(seen) == LENGTHS
        cached = torch.cat([torch.cat(parts) for parts in hidden])
        logprobs = (cached @ output_weight(model).T).log_softmax(-1)
        torch.testing.assert_close(logprobs, _own_logprobs(model, tokens), atol=1e-5, rtol=0)


def test_any_mix_of_chunk_lengths_gives_the_states_of_whole_sequences() -> None:
    """Drawn mixes, among them the last sequence alone being long, and one token in every other."""
    model = _model(CONFIGS[0])
    draw = np.random.default_rng(0)
    mixes = [np.array([1, 1, 40]), np.array([40, 1, 1]), np.array([2] * 12 + [50])]
    mixes += [draw.choice([1, 2, 3, 25, 60], size=draw.integers(1, 20)) for _ in range(40)]
    for counts in mixes:
        size = len(counts)
        rows = [torch.from_numpy(draw.integers(61, size=count + 1)) for count in counts]
        slots = np.sort(draw.choice(3 * size, size=size, replace=False))
        cache = KVCache()
        cache.reserve(3 * size, 64)
        with torch.no_grad():
            for past, part in ((0, [row[:1] for row in rows]), (1, [row[1:] for row in rows])):
                lengths = np.array([len(piece) for piece in part])
                layout = cached_layout(cache, slots, np.full(size, past), lengths, torch.device("cpu"))
                out = packed_forward(model, torch.cat(part), layout)
            whole = hidden_states(model, torch.cat(rows), torch.tensor(counts + 1))
        wanted = torch.cat([states[1:] for states in whole.split((counts + 1).tolist())])
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_long_chunks_among_short_ones_are_cut_off_into_a_block_of_their_own() -> None:
    cache = KVCache()
    cache.reserve(32, 128)
    counts = np.array([2] * 30 + [60, 70])
    layout = cached_layout(cache, np.arange(32), np.zeros(32, dtype=np.int64), counts, torch.device("cpu"))
    assert [(block.rows, block.chunk) for block in layout.blocks] == [(32, 2), (2, 68)]


def test_positions_count_from_the_start_of_every_run() -> None:
    assert positions_within(np.array([2, 3]), np.array([5, 0])).tolist() == [5, 6, 0, 1, 2]


def test_a_model_without_a_layout_behaves_as_the_library_meant_it() -> None:
    model = _model(CONFIGS[0])
    tokens = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("eager")
        torch.testing.assert_close(
            ours, model(tokens, attention_mask=mask).logits[mask.bool()], atol=1e-5, rtol=0
        )


def test_the_check_passes_models_with_plain_attention() -> None:
    assert check_packed_forward(_model(CONFIGS[0])) < 1e-4
    assert (
        check_packed_forward(
            _model(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))
        )
        < 1e-4
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Gemma2Config(**SIZES, head_dim=16), "softcap"),  # of its attention scores
        (GraniteConfig(**SIZES, logits_scaling=3.0), "other logprobs"),  # of its head
    ],
)
def test_the_check_refuses_models_whose_attention_or_head_does_more(
    config: PreTrainedConfig, words: str
) -> None:
    with pytest.raises(RequirementError, match=words):
        check_packed_forward(_model(config))


def test_a_sequence_longer_than_the_attention_window_is_refused() -> None:
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    model = _model(sliding)
    assert context_limit(model) == 8
    hidden_states(model, torch.arange(16), torch.tensor([8, 8]))
    with pytest.raises(RequirementError, match="max_context to 8"):
        hidden_states(model, torch.arange(9), torch.tensor([9]))


WINDOWED = [
    Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
]


@pytest.mark.parametrize("config", WINDOWED, ids=lambda config: config.model_type)
@pytest.mark.parametrize("chunk", [512, 3], ids=["at once", "some at a time"])
def test_layers_that_slide_beside_others_see_their_window_and_learn_from_it(
    config: PreTrainedConfig, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.policy.attention.WINDOW_CHUNK", chunk)
    model = _model(config)
    lengths = (40, 3, 17, 8)
    rows = torch.randint(61, (sum(lengths),), generator=torch.Generator().manual_seed(1)).split(lengths)
    model.set_attn_implementation("eager")
    own = torch.cat([model(row[None], use_cache=False).logits[0].log_softmax(-1) for row in rows])
    model.set_attn_implementation(PACKED)
    hidden = hidden_states(model, torch.cat(rows), torch.tensor(lengths))
    packed = (hidden @ output_weight(model).T).log_softmax(-1)
    torch.testing.assert_close(packed, own, atol=1e-5, rtol=0)

    picks = torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((own * picks).sum(), list(model.parameters()))
    found = torch.autograd.grad((packed * picks).sum(), list(model.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", WINDOWED, ids=lambda config: config.model_type)
@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 5, 11)], ids=["in place", "scattered"])
def test_layers_that_slide_read_no_more_of_the_cache_than_their_window(
    config: PreTrainedConfig, slots: tuple[int, ...]
) -> None:
    model = _model(config)
    lengths = np.array([40, 12, 21])
    rows = [torch.from_numpy(np.random.default_rng(k).integers(61, size=n)) for k, n in enumerate(lengths)]
    cache = KVCache()
    cache.reserve(12, 40)
    cuts = [
        np.array(cut) for cut in ([0, 0, 0], [2, 5, 9], [3, 6, 10], [30, 8, 11], [31, 11, 20], [40, 12, 21])
    ]
    hidden: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for begin, end in pairwise(cuts):
            layout = cached_layout(cache, np.array(slots), begin, end - begin, torch.device("cpu"))
            chunks = [row[first:last] for row, first, last in zip(rows, begin, end, strict=True)]
            out = packed_forward(model, torch.cat(chunks), layout)
            assert out.isfinite().all()
            for parts, part in zip(hidden, out.split((end - begin).tolist()), strict=True):
                parts.append(part)
        found = [(torch.cat(parts) @ output_weight(model).T).log_softmax(-1) for parts in hidden]
        model.set_attn_implementation("eager")
        for ours, row in zip(found, rows, strict=True):
            own = model(row[None], use_cache=False).logits[0].log_softmax(-1)
            torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)


def test_an_unused_attention_window_limits_nothing() -> None:
    assert context_limit(_model(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8))) == 64


def test_lengths_that_do_not_add_up_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="sum to 3, wanted 4"):
        hidden_states(model, torch.arange(4), torch.tensor([1, 2]))


def test_the_weights_depend_on_the_seed_alone(tokenizer) -> None:
    config = PolicyConfig(device="cpu")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build_model(config, tokenizer, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parameters(), build_model(config, tokenizer, seed=3).parameters(), strict=True)
    )
    assert not torch.equal(output_weight(first), output_weight(build_model(config, tokenizer, seed=4)))


def test_the_built_model_has_heads_of_32_and_tied_embeddings(tokenizer) -> None:
    model = build_model(PolicyConfig(device="cpu"), tokenizer, seed=0)
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model.config.intermediate_size == 192
    assert output_weight(model) is model.get_input_embeddings().weight
    assert output_weight(model).shape == (len(tokenizer), 64)


def test_sizes_that_do_not_divide_are_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match="hidden_size is 64"):
        build_model(PolicyConfig(device="cpu", heads=3), tokenizer, seed=0)
