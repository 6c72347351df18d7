"""Named statistics in the passes of the learner: values, gradients, and that nothing else changes."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_learner import CONTEXT, gradients, learner_of
from toy_policy import ToyPolicy, hidden_states, make_groups, sampled_at, toy_forward

from agentrl.algorithms import token_statistics as registry
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Term, requires, token_statistic
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.token_statistics import current_statistics, statistic
from agentrl.data.batch import collate
from agentrl.errors import RequirementError
from agentrl.learn import fused
from agentrl.learn.fused import token_statistics

NAMES = ("topk:3", "top_p_entropy:0.7", "log_z_minp:0.05", "entropy_change", "logprob_at:1.2")
SEQUENCES = ("sequence_logprob", "sequence_logprob:trajectory")
DOUBLE = torch.float64


def of_logits(*names):
    return tuple(current_statistics(names).of_logits.values())


def reference(name, p, token):
    """A statistic of one distribution p (sorted or not), written out in Python."""
    ordered = sorted(p, reverse=True)
    if name == "topk:3":
        return [*ordered, 0.0, 0.0][:3]
    if name == "top_p_entropy:0.7":
        kept = [value for index, value in enumerate(ordered) if sum(ordered[: index + 1]) < 0.7]
        return -sum(value / sum(kept) * math.log(value / sum(kept)) for value in kept)
    if name == "log_z_minp:0.05":
        return math.log(sum(value for value in p if value >= 0.05 * max(p)))
    if name == "entropy_change":
        entropy = -sum(value * math.log(value) for value in p)
        return sum(value**2 * (math.log(value) + entropy) for value in p)
    powers = [value ** (1 / 1.2) for value in p]
    return math.log(powers[token] / sum(powers))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["turn", "trajectory"])
def test_the_scoring_pass_describes_token_t_by_the_distribution_that_drew_it(name, layout):
    batch = collate(sampled_at(make_groups(), 0.6), layout=layout)
    policy = ToyPolicy()
    scored = learner_of(policy).score(batch, {name})
    values = token_statistic(scored, name)
    assert values.dtype == torch.float32
    assert not values[~batch.action_mask].any()
    allowed = {
        (int(row), int(position)): ids[ids >= 0]
        for row, position, ids in zip(
            batch.allowed.rows, batch.allowed.positions, batch.allowed.ids, strict=True
        )
    }
    for row, length in enumerate(batch.lengths.tolist()):
        states = hidden_states(policy, batch.tokens[row, :length], torch.tensor([length]))
        logits = (states @ policy.embedding.weight.T / 0.6).detach()
        for t in batch.action_mask[row].nonzero().flatten().tolist():
            ids = allowed.get((row, t), torch.arange(logits.shape[1]))
            p = logits[t - 1, ids].softmax(0).tolist()
            token = ids.tolist().index(int(batch.tokens[row, t]))
            assert values[row, t].tolist() == pytest.approx(reference(name, p, token), abs=1e-6)


def inputs(vocabulary=11):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(vocabulary, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    allowed = torch.stack([torch.randperm(vocabulary, generator=generator)[:5] for _ in range(6)])
    targets = allowed[:, 1].clone()
    allowed[::2, 3:] = -1
    return hidden, weight, targets, allowed


@pytest.mark.parametrize("name", [*NAMES, "top_p_entropy_inclusive:0.7"])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("constrained", [False, True])
def test_gradients_agree_with_finite_differences(name, chunk, constrained):
    hidden, weight, targets, allowed = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: token_statistics(
            h, w, targets, allowed if constrained else None, 0.7, chunk, of_logits(name)
        ),
        (hidden, weight),
        atol=1e-7,
    )


@pytest.mark.parametrize("constrained", [False, True])
def test_several_at_once_change_neither_each_other_nor_logprob_and_entropy(constrained):
    hidden, weight, targets, allowed = inputs()
    allowed = allowed if constrained else None
    asked = of_logits(*NAMES, "in_minp:0.05")

    def slopes(*extras):
        logprobs, entropies, *found = token_statistics(hidden, weight, targets, allowed, 0.7, 4, extras)
        loss = (logprobs * entropies).sum() + sum((values**2).sum() for values in found)
        return [logprobs, entropies], found, torch.autograd.grad(loss, (hidden, weight))

    own, _, base = slopes()
    together, found, total = slopes(*asked)
    for one, other in zip(own, together, strict=True):  # tiles sum in another order than chunks
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert found[-1].shape == (6, 3)  # topk, the last by name
    apart = [slopes(function)[2] for function in asked]
    for index, slope in enumerate(total):
        wanted = base[index] + sum(each[index] - base[index] for each in apart)
        torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-12)


def test_statistics_cost_no_further_product_with_the_output_embedding(monkeypatch):
    hidden, weight, targets, _ = inputs()
    calls = []
    logits_of = fused._logits
    monkeypatch.setattr(fused, "_logits", lambda *given: calls.append(1) or logits_of(*given))
    parts = token_statistics(hidden, weight, targets, chunk=3, extras=of_logits(*NAMES))
    sum(values.sum() for values in parts).backward()
    assert len(calls) == 4  # two chunks, forward and backward


@pytest.mark.parametrize("constrained", [False, True])
def test_with_statistics_too_the_logits_of_all_tokens_never_exist_at_once(constrained):
    from test_fused import LargestTensor

    tokens, vocabulary, chunk = 64, 100, 8
    hidden = torch.randn(tokens, 3, requires_grad=True)
    weight = torch.randn(vocabulary, 3, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    allowed = torch.arange(5).repeat(tokens, 1) if constrained else None
    with LargestTensor() as seen:
        parts = token_statistics(hidden, weight, targets, allowed, 1.0, chunk, of_logits(*NAMES))
        sum(values.sum() for values in parts).backward()
    assert seen.numbers == chunk * vocabulary


def test_chunks_are_smaller_with_statistics_so_that_memory_stays_bounded():
    assert fused._chunk_size(2**14, ()) == 1024
    assert fused._chunk_size(2**14, of_logits("entropy_change")) == 128


# Invariances of what is scored


def by_token(batch, name):
    """Statistics of the action tokens by episode and turn, in order."""
    found = {}
    for row, position in batch.action_mask.nonzero().tolist():
        key = batch.episodes[int(batch.trajectory[row])].id, int(batch.turns[row, position])
        found.setdefault(key, []).append(token_statistic(batch, name)[row, position].tolist())
    return found


def assert_alike(one, other):
    assert one.keys() == other.keys()
    for key, values in one.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(other[key]), rtol=0, atol=2e-6)


def scored(layout="trajectory", order=None, **settings):
    batch = collate(make_groups(), layout=layout)
    return learner_of(**settings).score(batch if order is None else batch.select(order), {*NAMES, *SEQUENCES})


def test_scored_statistics_depend_neither_on_layout_nor_micro_batch_nor_order_of_rows():
    plain = scored()
    rows = list(range(len(plain.lengths)))
    random.Random(1).shuffle(rows)
    others = scored("turn"), scored("turn", micro_batch_tokens=1), scored(order=rows)
    for name in (*NAMES, *SEQUENCES):
        assert any(any(torch.tensor(values).flatten()) for values in by_token(plain, name).values())
        for other in others:
            assert_alike(by_token(plain, name), by_token(other, name))


def test_selected_rows_and_moved_batches_keep_their_statistics():
    batch = scored("turn")
    part = batch.select([3, 0]).to("cpu")
    width = part.tokens.shape[1]
    for name in (*NAMES, *SEQUENCES):
        torch.testing.assert_close(
            token_statistic(part, name), token_statistic(batch, name)[[3, 0], :width], rtol=0, atol=0
        )


def test_without_decisions_statistics_are_zeros_of_their_shape():
    batch = collate(make_groups(groups=1, size=1)).select([0])
    batch.action_mask.zero_()
    outputs = toy_forward().score(ToyPolicy(), batch, statistics=current_statistics(["topk:3"]))
    assert outputs.extras["topk:3"].shape == (*batch.tokens.shape, 3)
    assert learner_of().score(collate([]), {"topk:3"}).extras["topk:3"].shape == (0, 0, 3)


# In the update


@requires(*(f"{name}:grad" for name in (*NAMES, "sequence_logprob")))
def every_statistic(outputs, mini, context):
    """A loss that is linear in every statistic, and reads a scored one beside it."""
    total = 0.01 * token_statistic(outputs, "sequence_logprob")
    for name in NAMES:
        values = token_statistic(outputs, name)
        total = total + (values.square().sum(-1) if values.dim() == 3 else values)
    return total


@requires("entropy_change", "topk:3")
def by_change(mini, context):
    return (
        1
        + token_statistic(mini.batch, "entropy_change").abs()
        + token_statistic(mini.batch, "topk:3")[..., 0]
    )


ALGORITHM = replace(GRPO().build(), terms=(Term("all", every_statistic, 0.3),), weights=(by_change,))


def assert_same_update(one, other, tolerance=1e-7):
    (numbers, slopes), (other_numbers, other_slopes) = one, other
    for name in ("learner/loss", "learner/term/all", "learner/grad_norm"):
        assert numbers[name] == pytest.approx(other_numbers[name], abs=tolerance), name
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, other_slopes[name], rtol=0, atol=tolerance)


def test_an_update_depends_neither_on_micro_batches_nor_order_nor_padding():
    batch = collate(make_groups(), layout="turn")
    whole = gradients(batch, ALGORITHM)
    rows = list(range(len(batch.lengths)))
    random.Random(1).shuffle(rows)
    assert_same_update(whole, gradients(batch, ALGORITHM, micro_batch_tokens=1))
    assert_same_update(whole, gradients(batch.select(rows), ALGORITHM))

    def widened(values, fill):
        return torch.cat([values, torch.full((len(values), 5), fill, dtype=values.dtype)], dim=1)

    fills = {"tokens": 3, "action_mask": False, "turns": 0, "rewards": 0.0}
    fills |= dict.fromkeys(("logprobs", "entropies"), math.nan)
    wide = replace(batch, **{name: widened(getattr(batch, name), fill) for name, fill in fills.items()})
    assert_same_update(whole, gradients(wide, ALGORITHM))


def test_an_update_is_the_same_in_both_layouts():
    one, other = (
        gradients(collate(make_groups(), layout=layout), ALGORITHM) for layout in ("turn", "trajectory")
    )
    assert_same_update(one, other)


def test_nan_in_the_statistics_of_other_tokens_changes_nothing():
    batch = learner_of().score(collate(make_groups()), ALGORITHM.requires)
    mask = batch.action_mask
    extras = {
        name: torch.where(mask if values.dim() == 2 else mask[..., None], values, math.nan)
        for name, values in batch.extras.items()
    }
    assert set(extras) == {"entropy_change", "topk:3"}
    poisoned = replace(batch, extras=extras)
    assert_same_update(gradients(batch, ALGORITHM), gradients(poisoned, ALGORITHM))


def test_the_gradient_of_a_term_is_that_of_autograd_through_the_whole_vocabulary():
    @requires("entropy_change:grad")
    def loss(outputs, mini, context):
        return token_statistic(outputs, "entropy_change")

    batch = collate(make_groups())
    algorithm = Algorithm(terms=(Term("change", loss, 1.0),), surrogate=lambda o, m, b: o.logprobs * 0)
    _, slopes = gradients(batch, algorithm)
    policy = ToyPolicy()
    outputs = toy_forward().score(policy, batch)  # for the weights of the sum alone
    total = 0.0
    allowed = {
        (int(r), int(t)): ids[ids >= 0]
        for r, t, ids in zip(batch.allowed.rows, batch.allowed.positions, batch.allowed.ids, strict=True)
    }
    per_row = batch.action_mask.sum(1)
    per_trajectory = torch.zeros(len(batch.episodes)).index_add(0, batch.trajectory, per_row.float())
    for row, length in enumerate(batch.lengths.tolist()):
        states = hidden_states(policy, batch.tokens[row, :length], torch.tensor([length]))
        logits = states @ policy.embedding.weight.T
        for t in batch.action_mask[row].nonzero().flatten().tolist():
            p = logits[t - 1, allowed.get((row, t), torch.arange(logits.shape[1]))].softmax(0)
            entropy = -(p * p.log()).sum()
            share = per_trajectory[batch.trajectory[row]] * len(batch.episodes)
            total = total + (p**2 * (p.log() + entropy)).sum() / share.double()
    assert outputs.extras == {}
    names, weights = zip(*policy.named_parameters(), strict=True)
    for name, value in zip(names, torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(slopes[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_current_outputs_hold_what_is_asked_with_and_without_gradient(updates):
    seen = []

    @requires("current", "topk:3", "entropy_change:grad", "sequence_logprob:trajectory")
    def watch(mini, context):
        seen.append({name: value.shape for name, value in mini.current.extras.items()})
        assert not mini.current.extras["entropy_change"].requires_grad
        if len(seen) == 1:  # the policy has not changed since the scoring pass
            scored_here = token_statistic(mini.batch, "topk:3")
            torch.testing.assert_close(token_statistic(mini.current, "topk:3"), scored_here, rtol=0, atol=0)
        return torch.ones_like(mini.advantages)

    batch = collate(make_groups())
    learner_of(epochs=updates).update(batch, Algorithm(weights=(watch,)), CONTEXT)
    size = tuple(batch.tokens.shape)
    wanted = {"topk:3": (*size, 3), "entropy_change": size, "sequence_logprob:trajectory": size}
    assert seen == [wanted] * updates


def test_a_diagnostic_reads_statistics_of_the_policy_before_the_update():
    @requires("entropy_change")
    def measure(rollout, context):
        values = token_statistic(rollout.batch, "entropy_change")[rollout.batch.action_mask]
        return {"change": float(values.mean())}

    batch = collate(make_groups())
    wanted = learner_of().score(batch, {"entropy_change"}).extras["entropy_change"][batch.action_mask].mean()
    numbers = learner_of().update(batch, Algorithm(diagnostics=(measure,)), CONTEXT)
    assert numbers["algorithm/change"] == pytest.approx(float(wanted), abs=1e-7)


def test_nothing_is_computed_that_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(registry._functions, "_functions", dict(registry._functions._functions))
    calls = []

    @statistic("counted")
    def counted(logits, tokens):
        calls.append((len(logits), torch.is_grad_enabled()))
        return logits[:, 0]

    batch = collate(make_groups())
    plain = gradients(batch, GRPO().build())
    assert calls == []
    assert learner_of().score(batch).extras == {}

    def reads(outputs, mini, context, name):
        return outputs.logprobs * 0

    asked = {
        name: replace(GRPO().build(), terms=(Term("t", requires(name)(partial(reads, name=name)), 0.0),))
        for name in ("counted", "counted:grad")
    }
    assert_same_update_of(plain, gradients(batch, asked["counted"]))
    # The shape by two tokens; then free and constrained tokens, in the scoring pass alone.
    assert sum(count for count, _ in calls) == 2 + int(batch.action_mask.sum())
    calls.clear()
    assert_same_update_of(plain, gradients(batch, asked["counted:grad"]))
    assert any(enabled for _, enabled in calls)


def assert_same_update_of(one, other):
    assert one[0]["learner/grad_norm"] == pytest.approx(other[0]["learner/grad_norm"], abs=1e-6)
    for name, slope in one[1].items():
        torch.testing.assert_close(slope, other[1][name], rtol=0, atol=1e-6)


def test_a_batch_that_was_scored_without_a_statistic_is_refused_by_its_reader():
    batch = learner_of().score(collate(make_groups()))
    with pytest.raises(RequirementError, match=r"entropy_change is not among the statistics of this batch"):
        learner_of().update(batch, Algorithm(weights=(by_change,)), CONTEXT)
