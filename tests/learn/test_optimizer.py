import pytest
import torch
from toy_policy import ToyPolicy

from agentrl.errors import ConfigError
from agentrl.learn.optimizer import build_optimizers, rate_factor, set_rates
from agentrl.learn.settings import LearnerConfig
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig


class Tokenizer:
    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return 32


def owned(optimizer):
    return {id(value) for group in optimizer.param_groups for value in group["params"]}


def test_muon_takes_the_hidden_matrices_and_adamw_embeddings_and_norms():
    policy = ToyPolicy()
    adamw, muon = build_optimizers(policy, LearnerConfig())
    assert owned(muon) == {id(policy.mix)}
    assert owned(adamw) == {id(policy.embedding.weight), id(policy.scale)}


def test_every_parameter_of_a_decoder_has_exactly_one_optimizer():
    model = build_model(PolicyConfig(hidden_size=16, layers=2, heads=1), Tokenizer(), 0)
    adamw, muon = build_optimizers(model, LearnerConfig())
    assert owned(adamw) | owned(muon) == {id(value) for value in model.parameters()}
    assert not owned(adamw) & owned(muon)
    assert id(model.get_output_embeddings().weight) in owned(adamw)
    assert len(owned(muon)) == 2 * 7  # q k v o gate up down, in each layer


def test_frozen_parameters_have_no_optimizer():
    policy = ToyPolicy()
    policy.embedding.requires_grad_(False)
    (adamw,) = build_optimizers(policy, LearnerConfig(optimizer="adamw"))
    assert id(policy.embedding.weight) not in owned(adamw)


def test_vectors_do_not_decay():
    policy = ToyPolicy()
    (adamw,) = build_optimizers(policy, LearnerConfig(optimizer="adamw", weight_decay=0.1))
    decay = {id(value): group["weight_decay"] for group in adamw.param_groups for value in group["params"]}
    assert decay[id(policy.scale)] == 0
    assert decay[id(policy.mix)] == decay[id(policy.embedding.weight)] == 0.1


def test_rates_are_warmed_up_and_decayed_for_both_optimizers():
    config = LearnerConfig(learning_rate=1e-3, matrix_learning_rate=4e-3, warmup_steps=2, schedule="cosine")
    # step 0 of 5: half by warm-up, 1 by the cosine; step 2: .55; step 4: .1
    factors = [rate_factor(config, index, 5) for index in (0, 2, 4)]
    assert factors == pytest.approx([0.5, 0.55, 0.1])
    optimizers = build_optimizers(ToyPolicy(), config)
    set_rates(optimizers, 0.5)
    set_rates(optimizers, 0.1)
    assert [group["lr"] for item in optimizers for group in item.param_groups] == pytest.approx(
        [1e-4, 1e-4, 4e-4]
    )


def test_a_muon_step_has_the_size_of_an_adamw_step():
    # Orthogonal updates have singular values near 1: a 64 x 64 one has rms 1/8, and .2 * sqrt(64) / 8 = .2.
    policy = torch.nn.Module()
    policy.matrix = torch.nn.Parameter(torch.zeros(64, 64))
    (muon,) = build_optimizers(policy, LearnerConfig(matrix_learning_rate=1.0))
    policy.matrix.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    muon.step()
    assert 0.1 < policy.matrix.square().mean().sqrt().item() < 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mini_batches": 0}, r"mini_batches: wrong value \(got 0"),
        ({"learning_rate": 0.0}, r"learning_rate: wrong value \(got 0.0"),
        ({"clip_gradient": -1.0}, r"clip_gradient: wrong value \(got -1.0"),
        ({"beta2": 1.0}, r"beta2: wrong value \(got 1.0"),
        ({"warmup_steps": -1}, r"warmup_steps: wrong value \(got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LearnerConfig(**settings)
