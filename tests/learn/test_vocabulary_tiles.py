from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentrl.learn import vocabulary_tiles
from agentrl.learn.vocabulary_tiles import tiled_statistics

N, WIDTH, VOCABULARY = 7, 4, 19


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(N, WIDTH, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (N,), generator=generator)


def naive(hidden, weight, targets, temperature=1.0):
    logits = hidden @ weight.T / torch.as_tensor(temperature).expand(len(hidden))[:, None]
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def loss_of(logprobs, entropies):
    mix = torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)
    return (mix * logprobs).sum() + 0.3 * (mix.flip(0) * entropies).sum()


@pytest.mark.parametrize(
    ("tile", "temperature"),
    list(
        product(
            [(1, 1), (3, 5), (7, 19), (100, 100), (2, 19)], [1.0, 0.5, torch.linspace(0.4, 1.6, N).double()]
        )
    ),
)
def test_tiles_of_any_shape_give_the_values_and_gradients_of_the_formula(tile, temperature, monkeypatch):
    monkeypatch.setattr(vocabulary_tiles, "CPU_TILE", tile)
    hidden, weight, targets = inputs()
    results = []
    for compute in (tiled_statistics, naive):
        found = compute(hidden, weight, targets, temperature)
        results.append((*found, *torch.autograd.grad(loss_of(*found), (hidden, weight))))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_no_token_gives_no_values_and_gradients_of_zero():
    _, weight, _ = inputs()
    hidden = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    logprobs, entropies = tiled_statistics(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = inputs()
    frozen = weight.detach()
    loss_of(*tiled_statistics(hidden, frozen, targets)).backward()
    wanted = torch.autograd.grad(loss_of(*naive(hidden, weight, targets)), hidden)[0]
    torch.testing.assert_close(hidden.grad, wanted, rtol=0, atol=1e-12)
    assert frozen.grad is None


def test_half_precision_is_rounded_once_and_not_after_every_tile(monkeypatch):
    monkeypatch.setattr(vocabulary_tiles, "CPU_TILE", (1, 2))
    hidden, weight, targets = inputs(torch.bfloat16)
    found = tiled_statistics(hidden, weight, targets)
    assert found[0].dtype == torch.float32
    ours = torch.autograd.grad(loss_of(*found), (hidden, weight))
    exact = [each.detach().float().requires_grad_() for each in (hidden, weight)]
    wanted = torch.autograd.grad(loss_of(*naive(*exact, targets)), exact)
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02)


def test_no_more_than_a_tile_of_logits_is_held(monkeypatch):
    monkeypatch.setattr(vocabulary_tiles, "CPU_TILE", (3, 5))
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    hidden, weight, targets = inputs()
    with Sizes():
        loss_of(*tiled_statistics(hidden, weight, targets)).backward()
    assert max(sizes) == weight.numel() < N * VOCABULARY  # the gradient of the weight
