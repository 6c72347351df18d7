"""Adapters learn in place of the weights, and a model without them gets what they learned."""

import copy
import sys

import pytest
import torch
from fsdp_worker import double_qwen, played
from torch import nn

from agentrl.algorithms.algorithm import Context, prepare
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError, MissingDependencyError
from agentrl.learn.learner import Learner
from agentrl.learn.lora import add_adapters, check_adapters, plain_weights
from agentrl.learn.settings import LearnerConfig, LoraConfig

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
    found = dict(plain_weights(policy))
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
        ConfigError, match="targets is qproj, wanted some of the policy's linear maps: down_proj,"
    ):
        check_adapters(double_qwen(0), LoraConfig(targets=("qproj",)))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[lora\]'"):
        check_adapters(OneMap(), LoraConfig(targets=("map",)))
