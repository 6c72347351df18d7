"""What a policy is counted to hold, beside what a real one holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import agentrl
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import CheckpointError
from agentrl.learn.forward import in_bfloat16
from agentrl.learn.optimizer import build_optimizers
from agentrl.learn.settings import LearnerConfig, LoraConfig
from agentrl.planning.memory import (
    activation_bytes,
    cache_bytes,
    checkpoint_bytes,
    generation_bytes,
    layer_bytes,
    learner_bytes,
    logits_bytes,
    optimizer_bytes,
    statistics_bytes,
    weight_bytes,
)
from agentrl.policy.attention import KVCache, cached_layout
from agentrl.policy.model import build_model, hidden_states, packed_forward, skeleton
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer

SETTINGS = agentrl.RunConfig()


@pytest.fixture(scope="module")
def block() -> PolicyConfig:
    return PolicyConfig(vocab_size=len(tokenizer()), device="cpu", max_context=128)


def tokenizer() -> Any:
    return fit_tokenizer(["You see a mug 1, a mug 2 and a desk 1.", "take mug 1 from desk 1"] * 4, 320)


@pytest.fixture
def model(block: PolicyConfig) -> PreTrainedModel:
    return build_model(block, tokenizer(), seed=0)


def test_statistics_are_counted_for_every_token_of_a_batch_and_of_a_mini_batch() -> None:
    """Of 64 episodes of 128 tokens: 10 + 1 numbers each; 2 more if a component reads the current policy."""

    @requires("topk:10", "entropy_change")
    def weight(mini: MiniBatch, context: Context) -> torch.Tensor:
        raise NotImplementedError

    @requires("current", "topk:2:grad")
    def loss(mini: MiniBatch, context: Context) -> torch.Tensor:
        raise NotImplementedError

    rollout = replace(SETTINGS.rollout, groups_per_step=8, group_size=8)
    config, learner = replace(SETTINGS, rollout=rollout), LearnerConfig(mini_batches=3)
    algorithm = Algorithm(weights=(weight,))
    assert statistics_bytes(config, algorithm, learner, 128)[0] == 4 * 128 * (11 * 64 + 11 * 22)
    both = replace(algorithm, weights=(weight, loss))
    assert statistics_bytes(config, both, learner, 128)[0] == 4 * 128 * (13 * 64 + 13 * 22)
    assert "token statistics" in learner_bytes(config, algorithm, learner)
    assert "token statistics" not in learner_bytes(config, Algorithm(), learner)


def test_a_skeleton_has_the_weights_of_the_model_that_is_built(
    block: PolicyConfig, model: PreTrainedModel
) -> None:
    bare = skeleton(block)
    assert {name: value.shape for name, value in bare.named_parameters()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    assert all(value.is_meta for value in bare.parameters())
    assert weight_bytes(bare) == 4 * sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimiser_states_are_those_of_a_real_first_step(
    name: str, block: PolicyConfig, model: PreTrainedModel
) -> None:
    settings = LearnerConfig(optimizer=name)
    stored = 0
    optimizers = build_optimizers(model, settings)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    for optimizer in optimizers:
        optimizer.step()
        states = optimizer.state_dict()["state"].values()
        stored += sum(value.nbytes for state in states for value in state.values())
    dealt, whole = optimizer_bytes(skeleton(block), settings)
    assert dealt + whole == stored
    assert (whole > 0) == (name == "muon")


def test_keys_and_values_are_those_of_a_cache_that_is_full(
    block: PolicyConfig, model: PreTrainedModel
) -> None:
    cache = KVCache()
    cache.reserve(16, 64)
    slots, past, counts = (torch.tensor([number]).numpy() for number in (0, 0, 5))
    with torch.no_grad():
        packed_forward(model, torch.arange(5), cached_layout(cache, slots, past, counts, torch.device("cpu")))
    held = sum(states.nbytes for pair in cache._layers.values() for states in pair)
    assert cache_bytes(skeleton(block), 16, 64) == held == 2 * 2 * 64 * 4 * 16 * 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_at_most_a_seventh_more_than_a_real_pass_keeps(
    dtype: str, block: PolicyConfig
) -> None:
    block = PolicyConfig(vocab_size=block.vocab_size, device="cpu", max_context=128, dtype=dtype)
    model = build_model(block, tokenizer(), seed=0)
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        hidden_states(model, torch.zeros(256, dtype=torch.int64), torch.tensor([128, 128]))
    real = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert real <= activation_bytes(skeleton(block), 256) <= real * 8 / 7


def test_so_are_those_of_layers_in_bfloat16_over_float32_weights(
    block: PolicyConfig, model: PreTrainedModel
) -> None:
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        in_bfloat16(hidden_states)(model, torch.zeros(256, dtype=torch.int64), torch.tensor([128, 128]))
    real = sum(value.untyped_storage().nbytes() for value in kept.values())
    counted = activation_bytes(skeleton(block), 256, rounded=True)
    assert real <= counted <= real * 8 / 7
    assert counted < activation_bytes(skeleton(block), 256)


@pytest.mark.parametrize("backend", ["single", "fsdp"])
def test_beside_an_engine_that_rounds_what_is_learned_stays_float32(backend: Any) -> None:
    recipe = build_recipe("grpo", {"kl_coefficient": 0.1}).build()
    learner = LearnerConfig(optimizer="adamw", backend=backend)
    rounding = replace(SETTINGS, policy=replace(SETTINGS.policy, dtype="bfloat16"))
    exact, rounded = (learner_bytes(config, recipe, learner) for config in (SETTINGS, rounding))
    for what in ("weights", "gradients", "optimiser", "reference"):
        assert rounded[what] == exact[what]
    assert rounded["weights that generate"][0] == exact["weights"][0] // 2
    assert rounded["activations"][0] < exact["activations"][0]
    assert ("weights that generate" in exact) == (backend == "fsdp")
    assert checkpoint_bytes(rounding, recipe, learner) == checkpoint_bytes(SETTINGS, recipe, learner)
    exactly = LearnerConfig(optimizer="adamw", backend=backend, compute_dtype="float32")
    assert learner_bytes(rounding, recipe, exactly)["activations"] == exact["activations"]


def test_recomputed_activations_are_the_inputs_of_the_layers_and_one_layer(block: PolicyConfig) -> None:
    model = skeleton(block)
    inputs = 2 * 256 * 64 * 4
    assert activation_bytes(model, 256, recomputed=True) == inputs + activation_bytes(model, 256) // 2


def test_logits_are_counted_for_one_chunk_only() -> None:
    model = skeleton(PolicyConfig(vocab_size=2**14))
    gradient = 2**14 * 64 * 4
    assert logits_bytes(model, 10) == 2 * 4 * 2**14 * 10 + gradient
    assert logits_bytes(model, 10**6) == 2 * 4 * 2**24 + gradient


def test_processes_that_share_weights_hold_a_part_and_what_must_be_whole() -> None:
    recipe = build_recipe("grpo").build()
    alone = learner_bytes(SETTINGS, recipe, LearnerConfig(optimizer="adamw"))
    shared = learner_bytes(SETTINGS, recipe, LearnerConfig(optimizer="adamw", backend="fsdp"), ranks=4)
    for what in ("weights", "gradients", "optimiser"):
        assert shared[what][0] == alone[what][0] // 4
    assert shared["weights that generate"][0] == alone["weights"][0]
    # Embedding and last norm, and both of the two layers: nothing is left out.
    assert layer_bytes(skeleton(PolicyConfig())) == weight_bytes(skeleton(PolicyConfig()))
    assert shared["weights of two layers"][0] == alone["weights"][0]


def test_adapters_alone_have_gradients_and_what_generates_is_a_copy() -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
    recipe = build_recipe("grpo").build()
    plain = learner_bytes(SETTINGS, recipe, LearnerConfig(optimizer="adamw"))
    adapted = learner_bytes(SETTINGS, recipe, LearnerConfig(optimizer="adamw", lora=LoraConfig(rank=2)))
    # Two layers of matrices 4 times 64 x 64 and 3 times 64 x 192, at rank 2, in float32.
    adapters = 4 * 2 * 2 * (4 * (64 + 64) + 3 * (64 + 192))
    assert adapted["gradients"][0] == adapters
    assert adapted["weights"][0] == plain["weights"][0] + adapters
    assert adapted["weights that generate"][0] == plain["weights"][0]
    # Two moments of each adapter, and a counter of steps for each of its 28 matrices.
    assert adapted["optimiser"][0] == 2 * adapters + 28 * 4


def test_a_pass_of_generation_gathers_one_layer_of_the_cache_again() -> None:
    whole = cache_bytes(skeleton(SETTINGS.policy), 8, SETTINGS.policy.max_context)
    assert generation_bytes(SETTINGS, 8)[0] == whole + whole // 2
    branching = agentrl.load_config(None, "algorithm.name=aepo")
    assert generation_bytes(branching, 8)[0] == 2 * (whole + whole // 2)


def test_a_reward_model_is_counted_with_its_gradients_and_optimiser(block: PolicyConfig) -> None:
    config = replace(SETTINGS, policy=block)
    prime, plain = build_recipe("prime").build(), build_recipe("prime", {"process_coefficient": 0.0}).build()
    for ranks, backend in ((1, "single"), (2, "fsdp")):
        learner = LearnerConfig(backend=backend)
        found = learner_bytes(config, prime, learner, ranks)
        assert found["reward model"][0] == 4 * found["weights"][0]
        assert found["reference"][0] == found["weights"][0]
        assert "reward model" not in learner_bytes(config, plain, learner, ranks)
    more = checkpoint_bytes(config, prime, learner) - checkpoint_bytes(config, plain, learner)
    assert more == 3 * weight_bytes(skeleton(block))


def test_a_reference_and_a_value_head_are_counted_where_the_algorithm_asks_for_them() -> None:
    learner = LearnerConfig(optimizer="adamw")
    plain, kl, critic = (
        learner_bytes(SETTINGS, build_recipe(name, settings).build(), learner)
        for name, settings in (("grpo", {}), ("grpo", {"kl_coefficient": 0.1}), ("ppo", {}))
    )
    assert "reference" not in plain
    assert kl["reference"][0] == plain["weights"][0]
    # Two moments of 64 weights and a bias in float32, and two counters of steps.
    assert critic["optimiser"][0] - plain["optimiser"][0] == 2 * 4 * 65 + 2 * 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no config.json is there"), ("{", "JSON"), ('{"model_type": "t5"}', "T5Config")],
)
def test_a_folder_without_a_causal_language_model_is_refused(
    content: str | None, reason: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"policy\.path is '{tmp_path}', wanted .*{reason}"):
        skeleton(PolicyConfig(path=str(tmp_path)))


def test_a_folder_with_a_model_gives_its_shapes(
    block: PolicyConfig, model: PreTrainedModel, tmp_path: Path
) -> None:
    model.config.save_pretrained(tmp_path)
    assert weight_bytes(skeleton(PolicyConfig(path=str(tmp_path)))) == weight_bytes(model)
