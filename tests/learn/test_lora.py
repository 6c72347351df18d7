"""Adapters learn in place of the weights, and a model without them gets what they learned."""

import copy
import sys

import pytest
import torch
from fsdp_worker import double_qwen, played
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError, MissingDependencyError
from agentrl.learn.learner import Learner
from agentrl.learn.lora import add_adapters, check_adapters, merged_weights
from agentrl.learn.settings import LearnerConfig, LoraConfig
from agentrl.policy.model import hidden_states

LORA = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))


class OneMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 2)
        nn.init.ones_(self.map.weight)
        nn.init.ones_(self.map.bias)


def test_a_product_is_added_to_the_weights_by_hand() -> None:
    pytest.importorskip("peft")
    policy = OneMap()
    add_adapters(policy, LoraConfig(rank=1, alpha=2.0, targets=("map",)))
    with torch.no_grad():
        policy.map.lora_A.default.weight.copy_(torch.tensor([[3.0, 0.5]]))
        policy.map.lora_B.default.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    found = dict(merged_weights(policy))
    # 1 + (2 / 1) [1, -1]^T [3, .5]
    assert found["map.weight"].tolist() == [[7.0, 2.0], [-5.0, 0.0]]
    assert found["map.bias"].tolist() == [1.0, 1.0]
    assert set(found) == {"map.weight", "map.bias"}


def test_only_adapters_learn_and_the_model_without_them_says_the_same() -> None:
    pytest.importorskip("peft")
    plain = double_qwen(0)
    before = copy.deepcopy(plain)
    policy = copy.deepcopy(plain)
    config = LearnerConfig(optimizer="adamw", learning_rate=0.01, warmup_steps=0, lora=LORA)
    learner, algorithm = Learner(policy, config), build_recipe("grpo").build()
    learner.export(plain)
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), before.parameters(), strict=True))

    batch = prepare(algorithm, played(algorithm, 0), Context())
    learner.update(batch, algorithm, Context())
    learner.export(plain)
    changed = {
        name
        for (name, value), old in zip(plain.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(value, old)
    }
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    scores = [each.score(batch).old_logprobs for each in (learner, Learner(plain, LearnerConfig()))]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
    unlearned = Learner(before, LearnerConfig()).score(batch).old_logprobs
    assert (scores[0] - unlearned).abs().max() > 1e-3


def test_adapters_of_maps_that_the_policy_lacks_are_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(
        ConfigError, match="targets is qproj, wanted some of the policy's linear layers: down_proj,"
    ):
        check_adapters(double_qwen(0), LoraConfig(targets=("qproj",)))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[lora\]'"):
        check_adapters(OneMap(), LoraConfig(targets=("map",)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_that_would_never_act_is_refused_and_not_recommended(tied: bool) -> None:
    pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=tied, **sizes))
    for targets in (("lm_head",), ("lm_head", "q_proj")):
        with pytest.raises(ConfigError) as refused:
            Learner(policy, LearnerConfig(lora=LoraConfig(targets=targets)))
        wanted = str(refused.value).partition("wanted")[2]
        assert "linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj;" in wanted
        assert "an adapter of lm_head would have no effect" in wanted
    assert all(value.requires_grad for value in policy.parameters())  # nothing was done


def test_a_policy_whose_maps_are_of_another_kind_is_told_that_it_has_none() -> None:
    pytest.importorskip("peft")
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ConfigError, match=r"targets is c_attn, wanted .* linear layers: it has none$"):
        check_adapters(policy, LoraConfig(targets=("c_attn",)))


def test_the_layer_computes_what_pefts_own_does() -> None:
    """Outputs and gradients are peft's, in float32 and under autocast."""
    peft = pytest.importorskip("peft")
    policy = double_qwen(0)
    add_adapters(policy, LORA)
    name, layer = next((n, m) for n, m in policy.named_modules() if hasattr(m, "lora_A"))
    torch.nn.init.normal_(layer.lora_B.default.weight)
    rows = torch.randn(3, 5, layer.in_features, dtype=layer.lora_A.default.weight.dtype)
    found = []
    for forward in (type(layer).forward, peft.tuners.lora.Linear.forward):
        x = rows.clone().requires_grad_()
        out = forward(layer, x)
        out.square().sum().backward()
        found.append((out, x.grad, *(part.default.weight.grad for part in (layer.lora_A, layer.lora_B))))
        layer.zero_grad()
    assert type(layer).forward is not peft.tuners.lora.Linear.forward, name
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(rows.float()), peft.tuners.lora.Linear.forward(layer, rows.float())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


def test_only_maps_that_are_called_get_an_adapter() -> None:
    """A map of a usable name that no sequence goes through would learn nothing and be saved as it was."""
    pytest.importorskip("peft")
    policy = double_qwen(0)
    policy.spare = nn.Module()
    policy.spare.q_proj = nn.Linear(4, 4)
    add_adapters(policy, LORA)
    adapted = {name for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    assert "spare.q_proj" not in adapted
    layers = policy.config.num_hidden_layers
    assert len(adapted) == 2 * layers
    tokens = torch.arange(6)
    called: set[str] = set()
    for name in adapted:
        policy.get_submodule(name).lora_A.default.register_forward_hook(
            lambda *_, name=name: called.add(name)
        )
    hidden_states(policy, tokens, torch.tensor([6]))
    assert called == adapted
