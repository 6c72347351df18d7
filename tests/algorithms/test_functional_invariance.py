"""What no function of a batch may depend on: masked values, padding, and which rows the tokens are in."""

import math

import pytest
import torch

from agentrl.algorithms import functional as f
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate

DOUBLE = torch.float64
MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
TURNS = torch.tensor([[-1, 0, 0, 0, 1], [-1, 2, 2, -1, -1], [-1, 0, 0, 0, -1]])
OWN = torch.tensor([0, 0, 1])


def draw(*shape):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(sum(shape)))


# (x, y, mask, turns, trajectory) -> [B, T]; x may have a gradient.
PER_TOKEN = {
    "discounted_returns": lambda x, y, m, k, own: f.discounted_returns(x, m, gamma=0.9),
    "restarted returns": lambda x, y, m, k, own: f.discounted_returns(x, m, gamma=0.9, restart=y > 0),
    "whiten": lambda x, y, m, k, own: f.whiten(x, m),
    "gae": lambda x, y, m, k, own: f.gae(x, y, m, k, gamma_turn=0.9, lam_token=0.8)[0],
    "gae returns": lambda x, y, m, k, own: f.gae(x, y, m, k, gamma_turn=0.9, lam_token=0.8)[1],
    "sequence_ratio": lambda x, y, m, k, own: f.sequence_ratio(x, y, m, k, own),
    "entropy_scaled_advantage": lambda x, y, m, k, own: f.entropy_scaled_advantage(x, y, m, scale=0.2),
    "covariance": lambda x, y, m, k, own: f.covariance(x, y, m),
    "turn_means": lambda x, y, m, k, own: f.broadcast_turns_to_tokens(
        f.turn_means(x, m, k, own, 2)[0], k, own, m
    ),
    "entropy_modulated_advantage": lambda x, y, m, k, own: modulated(x, y, m, k, own),
}
WEIGHTS = {
    "token": f.token_weights,
    "turn": lambda *rows: f.sequence_weights(*rows, sequence="turn"),
    "sequence": f.sequence_weights,
    "nested": f.trajectory_weights,
    "constant": lambda *rows: f.constant_weights(*rows, length=7),
}


def modulated(x, y, mask, turns, own):
    (advantages, _), (entropies, present) = (f.turn_means(z, mask, turns, own, 2) for z in (x, y))
    table = f.entropy_modulated_advantage(advantages, entropies, present, k=1.0, k_future=1.0, zeta=0.1)
    return f.broadcast_turns_to_tokens(table, turns, own, mask)


@pytest.mark.parametrize("function", PER_TOKEN.values(), ids=PER_TOKEN)
def test_no_value_at_a_masked_position_matters(function):
    results = []
    for poison in (0.0, math.nan):
        x = torch.where(MASK, draw(3, 5), poison).requires_grad_()
        y = torch.where(MASK, draw(5, 3).T, poison)
        out = function(x, y, MASK, TURNS, OWN)
        results.append([out.detach()])
        if out.requires_grad:
            (draw(3, 5) * out).sum().backward()
            results[-1].append(x.grad)
    for clean, poisoned in zip(*results, strict=True):
        assert clean.abs().sum() > 0
        assert poisoned.equal(clean)


@pytest.mark.parametrize("function", PER_TOKEN.values(), ids=PER_TOKEN)
def test_masked_positions_are_told_nothing(function):
    out = function(draw(3, 5), draw(5, 3).T, MASK, TURNS, OWN)[~MASK]
    assert out.equal(torch.full_like(out, 1.0 if function is PER_TOKEN["sequence_ratio"] else 0.0))


@pytest.mark.parametrize("name", ["discounted_returns", "restarted returns", "gae", "gae returns"])
def test_rows_do_not_look_at_each_other(name):
    x, y = draw(3, 5), draw(5, 3).T
    alone = [PER_TOKEN[name](x[r], y[r], MASK[r], TURNS[r], OWN[r]) for r in torch.arange(3).split(1)]
    assert torch.cat(alone).equal(PER_TOKEN[name](x, y, MASK, TURNS, OWN))


@pytest.mark.parametrize("function", PER_TOKEN.values(), ids=PER_TOKEN)
def test_padding_and_the_order_of_rows_change_nothing(function):
    x, y, order = draw(3, 5), draw(5, 3).T, torch.tensor([2, 0, 1])
    plain = function(x, y, MASK, TURNS, OWN)
    pad = torch.nn.functional.pad
    padded = function(
        pad(x[order], (0, 3), value=math.nan),
        pad(y[order], (0, 3), value=math.nan),
        pad(MASK[order], (0, 3)),
        pad(TURNS[order], (0, 3), value=-1),
        OWN[order],
    )
    torch.testing.assert_close(padded[:, :5], plain[order], rtol=0, atol=1e-12)
    assert plain.dtype == padded.dtype == DOUBLE


@pytest.mark.parametrize("function", PER_TOKEN.values(), ids=PER_TOKEN)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (2, 0), (2, 3)])
def test_without_decisions_there_is_nothing(function, shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    x = torch.full(shape, math.nan, dtype=DOUBLE)
    out = function(x, x, nothing, nothing.long() - 1, torch.arange(shape[0]))
    assert out.shape == shape
    assert out.equal(torch.full_like(out, 1.0 if function is PER_TOKEN["sequence_ratio"] else 0.0))


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (2, 3)])
def test_without_decisions_nothing_is_unrolled(shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    index, valid = f.unroll(nothing, nothing.long() - 1, torch.arange(shape[0]), episodes=shape[0])
    assert index.shape == valid.shape == (shape[0], 0)


def test_scaled_advantages_ignore_the_padding_of_the_table():
    entropies, advantages, present = (
        draw(2, 3).abs(),
        draw(3, 2).T,
        torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(),
    )
    settings = {"k": 1.0, "k_future": 0.5, "zeta": 0.1}
    plain = f.entropy_modulated_advantage(advantages, entropies, present, **settings)
    pad = torch.nn.functional.pad
    padded = f.entropy_modulated_advantage(
        pad(advantages, (0, 2), value=math.nan),
        pad(entropies, (0, 2), value=math.nan),
        pad(present, (0, 2)),
        **settings,
    )
    torch.testing.assert_close(padded, pad(plain, (0, 2)), rtol=0, atol=1e-14)
    swapped = f.entropy_modulated_advantage(
        advantages.flip(0), entropies.flip(0), present.flip(0), **settings
    )
    torch.testing.assert_close(swapped, plain.flip(0), rtol=0, atol=1e-14)


def test_the_mean_factor_of_a_step_is_one():
    entropies, present = draw(4, 6).abs(), draw(6, 4).T > -0.5
    scale, _ = f.entropy_modulation(entropies, present, k=2.0, k_future=1.0)
    assert scale[present].mean().item() == pytest.approx(1.0, abs=1e-6)
    assert scale[present].max() > 1.5
    assert (scale[~present] == 0).all()


# Layouts: the same episodes as rows of whole trajectories and as rows of single turns

GENERATOR = torch.Generator().manual_seed(1)


def turn(replies, decided, new_sequence=False):
    """A reply of which the given tokens were decisions; the others were forced."""
    numbers = torch.randn(2, replies, generator=GENERATOR).tolist()
    return Turn(
        "o",
        "a",
        prompt_ids=(1,) * 2,
        action_ids=(2,) * replies,
        logprobs=tuple(numbers[0]),
        entropies=tuple(numbers[1]),
        allowed=tuple((2, 3) if place in decided else (2,) for place in range(replies)),
        new_sequence=new_sequence,
        reward=1.0,
    )


def episode(name, *turns):
    return Episode(name, "env", "t", 0, turns, StopReason.TERMINATED)


GROUP = Group(
    "t",
    (
        episode(
            "a",
            turn(3, (0, 1), new_sequence=True),
            turn(2, ()),
            turn(2, (1,)),
            turn(4, (0, 2), new_sequence=True),
        ),
        episode("b", turn(1, (0,), new_sequence=True)),
        episode("c", turn(2, (), new_sequence=True)),
        episode("d", turn(3, (0, 1, 2), new_sequence=True), turn(3, (1,))),
    ),
)
LAYOUTS = [collate([GROUP], layout=layout) for layout in ("trajectory", "turn")]


def decisions(batch, values):
    """[B, T] -> [E, L], with 0 where there is no decision."""
    index, valid = f.unroll(batch.action_mask, batch.turns, batch.trajectory, len(batch.episodes))
    return torch.where(valid, values.double().flatten()[index], 0.0), valid


def test_decisions_are_the_same_in_both_layouts():
    (wide, exists), (narrow, also) = (decisions(batch, batch.logprobs) for batch in LAYOUTS)
    assert exists.sum(dim=1).tolist() == [5, 1, 0, 4]
    assert LAYOUTS[0].tokens.shape != LAYOUTS[1].tokens.shape
    assert exists.equal(also)
    assert wide.equal(narrow)
    first = GROUP.episodes[0].turns
    made = [first[0].logprobs[0], first[0].logprobs[1], first[2].logprobs[1]]
    assert wide[0, :3].tolist() == pytest.approx(made)


def test_unrolled_returns_and_advantages_are_the_same_in_both_layouts():
    results = []
    for batch in LAYOUTS:
        (rewards, valid), (values, _) = (decisions(batch, x) for x in (batch.logprobs, batch.entropies))
        turns, _ = decisions(batch, batch.turns)
        advantages, _ = f.gae(rewards, values, valid, turns.long(), gamma_turn=0.9, lam_token=0.8)
        results.append((advantages, f.discounted_returns(rewards, valid, gamma=0.9)))
        # By hand for trajectory d: three decisions of turn 0 and one of turn 1.
        last = rewards[3, 3] - values[3, 3]
        before = rewards[3, 2] + 0.9 * values[3, 3] - values[3, 2] + 0.9 * last
        assert advantages[3, 2].item() == pytest.approx(before.item())
    for wide, narrow in zip(*results, strict=True):
        assert wide.equal(narrow)


@pytest.mark.parametrize("function", ["sequence_ratio", "turn_means"])
def test_statistics_of_turns_are_the_same_in_both_layouts(function):
    def of(batch):
        rows = batch.action_mask, batch.turns, batch.trajectory
        if function == "sequence_ratio":
            return decisions(batch, f.sequence_ratio(batch.logprobs, batch.entropies, *rows))[0]
        means, present = f.turn_means(batch.logprobs, *rows, len(batch.episodes))
        assert present.tolist()[0] == [True, False, True, True]
        return means

    torch.testing.assert_close(of(LAYOUTS[0]), of(LAYOUTS[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_do_not_change_when_trajectories_are_split_into_rows(kind):
    (wide, _), (narrow, _) = (
        decisions(batch, weights / count)
        for batch in LAYOUTS
        for weights, count in [kind(batch.action_mask, batch.turns, batch.trajectory)]
    )
    assert wide.sum() > 0
    torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_depend_on_neither_padding_nor_the_order_of_rows(kind):
    weights, count = kind(MASK, TURNS, OWN)
    order = torch.tensor([1, 2, 0])
    pad = torch.nn.functional.pad
    padded, also = kind(pad(MASK[order], (0, 9)), pad(TURNS[order], (0, 9), value=-1), OWN[order])
    assert also == count
    torch.testing.assert_close(padded[:, :5], weights[order], rtol=0, atol=1e-15)
    assert (padded[:, 5:] == 0).all()


@pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)
def test_parts_with_whole_sequences_add_up(kind):
    weights, count = kind(MASK, TURNS, OWN)
    parts = [kind(MASK[rows], TURNS[rows], OWN[rows]) for rows in (slice(0, 2), slice(2, 3))]
    assert torch.cat([part for part, _ in parts]).equal(weights)
    assert sum(size for _, size in parts) == count


def test_a_trajectory_counts_once_however_many_rows_it_has():
    returns = LAYOUTS[0].returns
    assert returns.tolist() == [4.0, 1.0, 1.0, 2.0]
    advantages = f.group_relative_advantage(returns, LAYOUTS[0].groups)
    wide, narrow = (
        decisions(batch, f.broadcast_to_tokens(advantages, batch.trajectory, batch.action_mask))[0]
        for batch in LAYOUTS
    )
    assert wide.equal(narrow)
    assert wide[0, 0].item() == pytest.approx(2 / (math.sqrt(2) + 1e-6))
