"""Float32 weights under layers in bfloat16, and updates whose outcome is looked at."""

import math
import re
from typing import Any

import pytest
import torch
from fsdp_worker import qwen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from toy_policy import VOCABULARY, ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.batch import collate
from agentrl.errors import ConfigError, NonFiniteError
from agentrl.learn.forward import Forward, in_bfloat16
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig, LoraConfig
from agentrl.policy.model import hidden_states

CONTEXT = Context(step=2, total_steps=10, vocabulary=VOCABULARY)
BATCH = collate(make_groups())


def learner_of(policy: nn.Module | None = None, *, critic: bool = False, **settings: Any) -> Learner:
    defaults = {"optimizer": "adamw", "warmup_steps": 0, "schedule": "constant"}
    forward = Forward() if policy is not None else toy_forward()
    return Learner(
        policy or ToyPolicy(), LearnerConfig(**{**defaults, **settings}), critic=critic, forward=forward
    )


def gradients(learner: Learner, algorithm: Algorithm) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in learner.policy.named_parameters():
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(
                lambda value, name=name: found.update({name: value.grad.clone()})
            )
    learner.update(BATCH, algorithm, CONTEXT)
    return found


def relative(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    flat, same = (
        torch.cat([each[name].double().flatten() for name in sorted(other)]) for each in (one, other)
    )
    return float((flat - same).norm() / same.norm())


# In which numbers


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.parametrize("settings", [{}, {"recompute_activations": True}, {"micro_batch_tokens": 60}])
def test_layers_in_bfloat16_leave_weights_gradients_and_states_in_float32(
    name: str, settings: dict[str, Any]
) -> None:
    algorithm = build_recipe(name).build()
    critic = "values" in algorithm.requires
    exact = gradients(learner_of(qwen(), critic=critic, **settings), algorithm)
    learner = learner_of(qwen(), critic=critic, compute_dtype="bfloat16", **settings)
    rounded = gradients(learner, algorithm)
    assert 1e-4 < relative(rounded, exact) < 5e-2
    states = [value for _, value in learner._state.local_tensors(trained=True)]
    assert {value.dtype for value in (*rounded.values(), *states)} == {torch.float32}


def test_adapters_are_float32_under_layers_in_bfloat16_as_well() -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
    adapters = LoraConfig(rank=3, targets=("q_proj", "down_proj"))
    exact = gradients(learner_of(qwen(), lora=adapters), build_recipe("grpo").build())
    learner = learner_of(qwen(), lora=adapters, compute_dtype="bfloat16")
    rounded = gradients(learner, build_recipe("grpo").build())
    assert rounded.keys() == exact.keys()
    assert all(".lora_" in name for name in rounded)
    assert 1e-4 < relative(rounded, exact) < 5e-2
    assert {value.dtype for value in (*rounded.values(), *learner.policy.parameters())} == {torch.float32}


def test_products_and_attention_are_rounded_and_what_is_made_of_the_states_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, set[torch.dtype]] = {"attention": set(), "linear": set()}
    attend = F.scaled_dot_product_attention

    def watching(*args: Any, **kwargs: Any) -> Tensor:
        out = attend(*args, **kwargs)
        seen["attention"].add(out.dtype)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    policy = qwen()
    for module in policy.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, out: seen["linear"].add(out.dtype))
    tokens, lengths = torch.arange(7), torch.tensor([4, 3])
    states = in_bfloat16(hidden_states)(policy, tokens, lengths)
    assert seen == {"attention": {torch.bfloat16}, "linear": {torch.bfloat16}}
    assert states.dtype == torch.float32
    assert not torch.equal(states, states.bfloat16().float())
    learner = learner_of(policy, critic=True, compute_dtype="bfloat16")
    scored = learner.score(BATCH)
    assert scored.old_logprobs is not None
    assert scored.values is not None
    assert scored.old_logprobs.dtype == scored.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "engine", "computed"),
    [
        (None, "float32", "float32"),
        (None, "bfloat16", "bfloat16"),
        (None, "float16", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_layers_are_computed_as_asked_and_else_as_a_bfloat16_engine_does(
    asked: Any, engine: str, computed: str
) -> None:
    assert LearnerConfig(compute_dtype=asked).resolve_compute_dtype(engine).compute_dtype == computed


def test_asking_for_float32_changes_no_bit() -> None:
    ends = []
    for dtype in (None, "float32"):
        learner = learner_of(qwen(), compute_dtype=dtype)
        learner.update(BATCH, Algorithm(), CONTEXT)
        ends.append(list(learner.policy.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


# What came of an update


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_at_the_rate_of_a_pretrained_policy_the_weights_move(optimizer: str, compute_dtype: str) -> None:
    rates = {"learning_rate": 1e-6, "matrix_learning_rate": 1e-6}
    learner = learner_of(qwen(), optimizer=optimizer, compute_dtype=compute_dtype, **rates)
    before = [value.detach().clone() for value in learner.policy.parameters()]
    numbers = learner.update(BATCH, Algorithm(), CONTEXT)
    after = [value.detach() for value in learner.policy.parameters()]
    moved = sum(int((old != new).sum()) for old, new in zip(before, after, strict=True) if old.dim() == 2)
    assert moved > 0.9 * sum(value.numel() for value in before if value.dim() == 2)
    assert numbers["learner/weights_moved"] > 0.9
    assert numbers["learner/updates"] == 1


class Two(nn.Module):
    """Weights 1 and 2^-20 in float32, of which the loss below knows the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0], [2.0**-20]]))


def two_of(policy: nn.Module | None = None, **settings: Any) -> Learner:
    forward = Forward(
        hidden_states=lambda policy, tokens, lengths: torch.ones(len(tokens), 1),
        output_weight=lambda policy: torch.cat([policy.weight, torch.zeros(VOCABULARY - 2, 1)]),
    )
    defaults = {"optimizer": "adamw", "warmup_steps": 0, "schedule": "constant"}
    return Learner(policy or Two(), LearnerConfig(**{**defaults, **settings}), forward=forward)


@pytest.mark.parametrize(("rate", "share"), [(1e-3, 1.0), (1e-9, 0.5), (1e-30, 0.0)])
def test_the_share_of_weights_that_an_update_moved_is_told(rate: float, share: float) -> None:
    """The first step of AdamW is the rate; 1 has neighbours 6e-8 away, and 2^-20 has them 6e-14 away."""
    assert two_of(learning_rate=rate).update(BATCH, Algorithm(), CONTEXT)["learner/weights_moved"] == share


def test_weights_without_a_gradient_do_not_count_as_held_back() -> None:
    policy = Two()
    policy.weight.register_hook(lambda slope: slope * torch.tensor([[0.0], [1.0]]))
    numbers = two_of(policy, learning_rate=1e-9).update(BATCH, Algorithm(), CONTEXT)
    assert numbers["learner/weights_moved"] == 1.0
    assert policy.weight[0] == 1.0 != policy.weight[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lost", ["weight", "state"])
def test_an_update_that_leaves_no_numbers_stops_and_is_not_counted(optimizer: str, lost: str) -> None:
    learner = learner_of(qwen(), optimizer=optimizer)
    matrix = dict(learner.policy.named_parameters())["model.layers.1.mlp.up_proj.weight"]

    def spoil(stepped: Optimizer, *_: Any) -> None:
        if matrix in stepped.state:
            states = [value for value in stepped.state[matrix].values() if value.dim() == 2]
            (matrix.data if lost == "weight" else states[0])[0, 0] = math.inf

    for each in learner._state.optimizers:
        each.register_step_post_hook(spoil)
    assert learner.non_finite() == []
    with pytest.raises(NonFiniteError, match=r"were finite left nan or inf in .*up_proj.weight at a"):
        learner.update(BATCH, Algorithm(), CONTEXT)
    assert len(learner.non_finite()) == 1
    assert learner.skipped_updates == 0


@pytest.mark.parametrize("where", ["weight", "value head", "frozen", "state"])
def test_whatever_a_learner_holds_is_looked_at(where: str) -> None:
    learner = Learner(
        qwen(), LearnerConfig(optimizer="adamw", warmup_steps=0), reference=qwen(1), critic=True
    )
    learner.update(BATCH, Algorithm(), CONTEXT)
    assert learner.value_head is not None
    assert learner.reference is not None
    norm = dict(learner.policy.named_parameters())["model.norm.weight"]
    wrong = {
        "weight": (norm, "model.norm.weight"),
        "value head": (learner.value_head.bias, "value_head.bias"),
        "frozen": (
            dict(learner.reference.named_parameters())["model.norm.weight"],
            "reference.model.norm.weight",
        ),
        "state": (learner._state.optimizers[0].state[norm]["exp_avg"], "exp_avg of model.norm.weight"),
    }
    tensor, name = wrong[where]
    assert learner.non_finite() == []
    with torch.no_grad():
        tensor[0] = math.inf
    assert learner.non_finite() == [name]


@pytest.mark.parametrize("name", ["learning_rate", "matrix_learning_rate", "clip_gradient", "weight_decay"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e38])
def test_rates_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}: wrong value (got {value}, wanted ")):
        LearnerConfig(**{name: value})


def test_so_is_the_scale_of_adapters() -> None:
    with pytest.raises(ConfigError, match=r"alpha: wrong value \(got inf, wanted above 0 and"):
        LoraConfig(alpha=math.inf)
