import pytest
import torch
from toy_policy import VOCABULARY, WIDTH, ToyPolicy, hidden_states, make_groups, sampled_at, toy_forward

from agentrl.data.batch import collate
from agentrl.learn.forward import Forward, needed_lengths
from agentrl.learn.ranks import ALONE
from agentrl.learn.scoring import Scorer
from agentrl.learn.sharding import ScoringModule
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig


class Tokenizer:
    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return VOCABULARY


def expected(logits_of, batch, temperature=1.0):
    """Token t from the logits at t - 1, decision by decision."""
    allowed = {}
    if batch.allowed is not None:
        for row, position, ids in zip(
            batch.allowed.rows, batch.allowed.positions, batch.allowed.ids, strict=True
        ):
            allowed[int(row), int(position)] = ids[ids >= 0]
    logprobs = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    entropies = torch.zeros_like(logprobs)
    for row, length in enumerate(batch.lengths.tolist()):
        logits = logits_of(batch.tokens[row, :length]).double()
        for t in batch.action_mask[row].nonzero().flatten().tolist():
            ids = allowed.get((row, t), torch.arange(VOCABULARY))
            drawn_at = temperature if isinstance(temperature, float) else temperature[row, t]
            log_p = (logits[t - 1, ids] / drawn_at).log_softmax(-1)
            logprobs[row, t] = log_p[ids == batch.tokens[row, t]]
            entropies[row, t] = -(log_p.exp() * log_p).sum()
    return logprobs, entropies


def test_token_t_is_described_by_the_state_at_t_minus_1():
    policy = ToyPolicy()
    for temperature in (1.0, 0.6):
        batch = collate(sampled_at(make_groups(), temperature))
        assert batch.allowed is not None
        assert len(batch.allowed.rows) < int(batch.action_mask.sum())  # constrained and free are mixed
        outputs = toy_forward().score(policy, batch)

        def logits_of(row):
            return hidden_states(policy, row, torch.tensor([len(row)])) @ policy.embedding.weight.T

        logprobs, entropies = expected(logits_of, batch, temperature)
        torch.testing.assert_close(outputs.logprobs, logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(outputs.entropies, entropies, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("by_token", [False, True])
def test_every_token_is_scored_at_the_temperature_that_it_was_sampled_at(layout, by_token):
    policy = ToyPolicy()
    groups = sampled_at(make_groups(), 0.5, 1.0, 1.7, by_token=by_token)
    batch = collate(groups, layout=layout)
    assert len(batch.temperatures[batch.action_mask].unique()) == 3

    def logits_of(row):
        return hidden_states(policy, row, torch.tensor([len(row)])) @ policy.embedding.weight.T

    logprobs, entropies = expected(logits_of, batch, batch.temperatures)
    for budget in (10_000, 30, 1):
        found = Scorer(toy_forward(), budget, ALONE).score(ScoringModule(policy), batch)
        torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.entropies.double(), entropies, rtol=0, atol=1e-6)
    some = [3, 1, 5, 0]  # of another width, and in another order
    part = toy_forward().score(policy, batch.select(some))
    width = part.logprobs.shape[1]
    assert width < batch.tokens.shape[1]
    torch.testing.assert_close(part.logprobs, logprobs[some, :width], rtol=0, atol=1e-12)


def test_a_temperature_divides_logits_and_leaves_the_value_as_it_is():
    policy, head = ToyPolicy(), torch.nn.Linear(WIDTH, 1, dtype=torch.float64)
    plain = toy_forward().score(policy, collate(make_groups()), head)
    tempered = toy_forward().score(policy, collate(sampled_at(make_groups(), 0.5, 1.5)), head)
    assert torch.equal(tempered.values, plain.values)
    assert not torch.allclose(tempered.logprobs, plain.logprobs)


def test_batches_at_temperature_1_hold_no_temperatures_and_greedy_tokens_count_as_sampled_at_1():
    for groups in (make_groups(), sampled_at(make_groups(), 1.0), sampled_at(make_groups(), 0.0)):
        assert collate(groups).temperatures is None


def test_a_decoder_read_in_packed_rows_says_what_it_says_row_by_row():
    model = build_model(PolicyConfig(hidden_size=16, layers=2, heads=1), Tokenizer(), 0)
    batch = collate(make_groups(), layout="turn")
    with torch.no_grad():
        outputs = Forward().score(model, batch)
        logprobs, entropies = expected(lambda row: model(input_ids=row[None]).logits[0], batch)
    torch.testing.assert_close(outputs.logprobs.double(), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.entropies.double(), entropies, rtol=0, atol=1e-5)


def test_nothing_after_the_last_decision_is_computed():
    policy, batch = ToyPolicy(), collate(make_groups())
    seen = []

    def watched(policy, tokens, lengths):
        seen.append((len(tokens), lengths.tolist()))
        return hidden_states(policy, tokens, lengths)

    Forward(watched, toy_forward().output_weight).score(policy, batch)
    last = [int(row.nonzero().max()) if row.any() else 0 for row in batch.action_mask]
    assert needed_lengths(batch).tolist() == last
    assert seen == [(sum(last), [length for length in last if length])]


def test_a_batch_without_decisions_is_described_by_zeros():
    batch = collate(make_groups(groups=1, size=1))
    silent = batch.select([0])
    silent.action_mask.zero_()
    outputs = toy_forward().score(ToyPolicy(), silent)
    assert not outputs.logprobs.any()
    assert toy_forward().score(ToyPolicy(), collate([])).logprobs.shape == (0, 0)
