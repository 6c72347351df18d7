import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentrl.learn import fused
from agentrl.learn.fused import token_statistics

N, WIDTH, VOCABULARY = 7, 4, 19
DOUBLE = torch.float64


def inputs(seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    allowed = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:5] for _ in range(N)])
    targets = allowed[:, 2].clone()
    allowed[::2, 3:] = -1  # every other token has three choices, not five
    return hidden, weight, targets, allowed


def naive(hidden, weight, targets, allowed, temperature):
    logits = hidden @ weight.T / torch.as_tensor(temperature).expand(N)[:, None]
    closed = torch.zeros(logits.shape, dtype=torch.bool)
    if allowed is not None:
        closed[:] = True
        for row, ids in enumerate(allowed):
            closed[row, ids[ids >= 0]] = False
    logprobs = logits.masked_fill(closed, -math.inf).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs.masked_fill(closed, 0.0)).sum(-1)
    return logprobs[torch.arange(N), targets], entropies


@pytest.fixture(params=["dense", "fetched"])
def way(request, monkeypatch):
    """Both ways to the logits of allowed ids: a product with all rows, or with those fetched."""
    monkeypatch.setattr(fused, "_DENSE_RATIO", 1000 if request.param == "dense" else 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("constrained", "chunk", "temperature"),
    list(product([False, True], [None, 1, 3], [1.0, 0.5, torch.linspace(0.4, 1.6, N, dtype=DOUBLE)])),
)
def test_values_and_gradients_are_those_of_the_naive_formula(constrained, chunk, temperature):
    hidden, weight, targets, allowed = inputs()
    allowed = allowed if constrained else None
    mix = torch.randn(2, N, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    results = []
    for logprobs, entropies in (
        token_statistics(hidden, weight, targets, allowed, temperature, chunk),
        naive(hidden, weight, targets, allowed, temperature),
    ):
        loss = (mix[0] * logprobs + mix[1] * entropies).sum()
        results.append((logprobs, entropies, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("constrained", [False, True])
def test_gradients_agree_with_finite_differences(constrained):
    hidden, weight, targets, allowed = inputs(seed=2)
    allowed = allowed if constrained else None
    assert torch.autograd.gradcheck(
        lambda h, w: token_statistics(h, w, targets, allowed, 0.7, 3), (hidden, weight), atol=1e-7
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("constrained", [False, True])
def test_one_temperature_for_all_and_the_same_for_each_give_the_same_bits(constrained):
    hidden, weight, targets, allowed = inputs(dtype=torch.float32)
    allowed = allowed if constrained else None
    results = []
    for temperature in (0.7, torch.full((N,), 0.7, dtype=DOUBLE)):
        found = token_statistics(hidden, weight, targets, allowed, temperature, 3)
        results.append((*found, *torch.autograd.grad(sum(map(torch.sum, found)), (hidden, weight))))
    assert all(map(torch.equal, *results))


def test_entropies_of_the_specification():
    logits = torch.tensor([[0, 0, 0, 0], [2, 1, 0, -1], [5, 0, 0, 0]], dtype=DOUBLE, requires_grad=True)
    targets = torch.tensor([1, 0, 0])
    logprobs, entropies = token_statistics(logits, torch.eye(4, dtype=DOUBLE), targets)
    wanted = torch.tensor([1.3862943611, 0.9475369640, 0.1190789401], dtype=DOUBLE)
    torch.testing.assert_close(entropies, wanted, rtol=0, atol=1e-9)
    wanted = torch.tensor([-1.38629436, -0.44018970, -0.02001225], dtype=DOUBLE)
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-8)
    (slope,) = torch.autograd.grad(entropies.sum(), logits)
    wanted = torch.tensor(
        [
            [0, 0, 0, 0],
            [-0.32668814, 0.11670097, 0.13007621, 0.07991097],
            [-0.09710385, 0.03236795, 0.03236795, 0.03236795],
        ],
        dtype=DOUBLE,
    )
    torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-8)
    _, cool = token_statistics(logits, torch.eye(4, dtype=DOUBLE), targets, temperature=0.5)
    wanted = torch.tensor([1.38629436, 0.45542862, 0.00149800], dtype=DOUBLE)
    torch.testing.assert_close(cool.detach(), wanted, rtol=0, atol=1e-8)


def test_two_equal_choices_have_the_entropy_of_a_coin():
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [1.0], [50.0]])
    logprobs, entropies = token_statistics(hidden, weight, torch.tensor([1]), torch.tensor([[0, 1, -1]]))
    assert logprobs.item() == pytest.approx(-math.log(2), abs=1e-6)
    assert entropies.item() == pytest.approx(math.log(2), abs=1e-6)


def test_probabilities_that_underflow_give_finite_numbers_and_gradients():
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    for allowed in (None, torch.tensor([[0, 1, 2]])):
        logprobs, entropies = token_statistics(hidden, weight, torch.tensor([1]), allowed)
        gradients = torch.autograd.grad((logprobs + entropies).sum(), (hidden, weight))
        assert (logprobs.item(), entropies.item()) == (-1000.0, 0.0)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_half_precision_states_give_single_precision_statistics():
    hidden, weight, targets, _ = inputs(dtype=torch.bfloat16)
    logprobs, entropies = token_statistics(hidden, weight, targets)
    assert logprobs.dtype == entropies.dtype == torch.float32
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_no_tokens_have_no_statistics():
    _, weight, _, _ = inputs()
    logprobs, entropies = token_statistics(torch.zeros(0, WIDTH, dtype=DOUBLE), weight, torch.zeros(0).long())
    assert logprobs.shape == entropies.shape == (0,)


def test_lengths_that_disagree_are_refused():
    hidden, weight, targets, _ = inputs()
    with pytest.raises(ValueError, match="7 hidden states for 6 targets"):
        token_statistics(hidden, weight, targets[1:])


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_the_logits_of_all_constrained_tokens_never_exist_at_once():
    tokens, vocabulary, chunk = 64, 100, 8
    hidden = torch.randn(tokens, 3, requires_grad=True)
    weight = torch.randn(vocabulary, 3, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    allowed = torch.arange(5).repeat(tokens, 1)
    with LargestTensor() as seen:
        logprobs, entropies = token_statistics(hidden, weight, targets, allowed, chunk=chunk)
        (logprobs.sum() + entropies.sum()).backward()
    assert seen.numbers == chunk * vocabulary
