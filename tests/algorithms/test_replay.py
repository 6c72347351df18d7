import io
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms.algorithm import Algorithm, ReplayBatch
from agentrl.algorithms.hooks import Context, MiniBatch, token_statistic
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.algorithms.self_imitation import decayed, recalibrated
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Layout, collate
from agentrl.errors import CheckpointError
from agentrl.learn.packing import mini_batches

POLICY = {"tokenizer": "abc", "vocabulary": 50}


def context(step: int, seed: int = 0) -> Context:
    return Context(step, 100, seed=seed, **POLICY)


def buffer(size: int = 1, *, tolerance: int = 5, coefficient=lambda context: 1.0, **others) -> ReplayBuffer:
    settings = {"baselines": 100, "recompute_advantage": recalibrated} | others
    return ReplayBuffer(
        lambda _: Algorithm(), size=size, tolerance=tolerance, coefficient=coefficient, **settings
    )


def episode(name: str, reward: float, replies: Sequence[Sequence[int]] = ((7, 8),), **turn) -> Episode:
    turns = tuple(
        Turn(
            "o",
            "a",
            prompt_ids=(1,),
            action_ids=tuple(ids),
            logprobs=(-0.5,) * len(ids),
            entropies=(0.5,) * len(ids),
            new_sequence=number == 0,
            **turn,
        )
        for number, ids in enumerate(replies)
    )
    turns = (*turns[:-1], replace(turns[-1], reward=reward))
    return Episode(name, "env", f"task of {name}", 0, turns, StopReason.TERMINATED)


def rollout(
    groups: Sequence[Sequence[Episode]], advantages: Sequence[float], layout: Layout = "trajectory"
) -> MiniBatch:
    """A scored batch in which all decisions of a trajectory have its advantage."""
    batch = collate([Group(f"t{i}", tuple(members)) for i, members in enumerate(groups)], layout=layout)
    old = torch.where(batch.action_mask, batch.logprobs - 0.1, 0.0)
    batch = replace(batch, old_logprobs=old, old_entropies=batch.entropies + 0.1)
    values = torch.tensor(advantages, dtype=torch.float64)[batch.trajectory][:, None]
    return MiniBatch(batch, torch.where(batch.action_mask, values, 0.0))


def earning(good: Sequence[Episode], layout: Layout = "trajectory") -> MiniBatch:
    """Episodes with advantage .5, and three groups that earned nothing, so that the baseline is 0."""
    idle = [[episode(f"idle{number}", 0.0)] for number in range(3)]
    return rollout([good, *idle], [0.5] * len(good) + [0.0] * 3, layout)


def fill(memory: ReplayBuffer, rows: int, step: int = 0) -> None:
    memory.update(earning([episode(f"{step}.{number}", 1.0) for number in range(rows)]), context(step))


def recalled(replayed: ReplayBatch | None) -> list[str]:
    assert replayed is not None
    batch = replayed.batch
    return [batch.episodes[owner].id for owner in batch.trajectory.tolist()]


@pytest.mark.vector("S-6")
@pytest.mark.parametrize(("size", "rows", "wanted"), [(8, 13, 8), (20, 31, 16), (12, 19, 12)])
def test_more_than_one_and_a_half_times_the_size_recalls_a_power_of_two(size, rows, wanted):
    memory = buffer(size)
    fill(memory, rows)
    names = recalled(memory.sample(context(1)))
    assert len(names) == len(set(names)) == wanted
    assert memory.metrics()["recalled"] == wanted


@pytest.mark.vector("S-6")
@pytest.mark.parametrize(("size", "rows"), [(8, 12), (20, 30), (12, 18)])
def test_one_and_a_half_times_the_size_is_not_enough(size, rows):
    memory = buffer(size)
    fill(memory, rows)
    assert memory.sample(context(1)) is None
    assert memory.metrics()["usable"] == rows


def test_rows_at_or_below_the_baseline_do_not_count_as_enough():
    memory = buffer(1)
    memory.update(
        rollout([[episode(str(i), r)] for i, r in enumerate((0.0, 0.5, 0.5, 1.0))], [0.5] * 4), context(0)
    )
    assert memory.sample(context(1)) is None
    assert (memory.metrics()["size"], memory.metrics()["usable"]) == (4, 1)


def five_groups() -> MiniBatch:
    """Group means .2, .5, .6, .8, .1."""
    returns = [[0.4, 0.0], [1.0, 0.0], [0.6, 0.6], [1.0, 0.6], [0.1, 0.1]]
    advantages = [0.2, -0.2, 0.5, -0.5, 0.1, -0.1, -0.1, -0.3, 0.0, 0.0]
    members = [
        [episode(f"{number}{letter}", value) for letter, value in zip("ab", pair, strict=True)]
        for number, pair in enumerate(returns)
    ]
    return rollout(members, advantages)


@pytest.mark.vector("S-2")
def test_a_row_needs_a_positive_advantage_then_and_a_return_above_the_median_of_the_groups_now():
    memory = buffer(1)
    memory.update(five_groups(), context(0))
    # Kept are returns .4, 1, .6 (advantages .2, .5, .1); the median mean is .5, which leaves .5 and .1.
    found = {}
    for seed in range(20):
        again = buffer(1)
        again.load_state_dict(memory.state_dict(), context(0))
        replayed = again.sample(context(1, seed))
        found[recalled(replayed)[0]] = replayed.advantages[0, -1].item()
    assert set(found) == {"1a@0", "2a@0"}
    assert found["1a@0"] == pytest.approx(0.5, abs=1e-12)
    assert found["2a@0"] == pytest.approx(0.1, abs=1e-12)
    assert again.metrics()["rejected_share"] == pytest.approx(1 / 3)
    assert again.metrics()["baseline"] == 0.5


@pytest.mark.vector("S-2")
@pytest.mark.parametrize(
    ("means", "newest", "wanted"),
    [((0.2, 0.4, 0.6, 0.8), 100, 0.5), ((0.2, 0.5, 0.6, 0.8, 0.1), 100, 0.5), ((9.0, 1.0, 2.0), 2, 1.5)],
)
def test_the_baseline_is_the_median_of_the_newest_group_means(means, newest, wanted):
    memory = buffer(baselines=newest)
    groups = [[episode(f"{i}+", mean + 0.1), episode(f"{i}-", mean - 0.1)] for i, mean in enumerate(means)]
    memory.update(rollout(groups, [0.0] * 2 * len(means)), context(0))
    memory.sample(context(1))
    assert memory.metrics()["baseline"] == pytest.approx(wanted, abs=1e-12)


def test_a_row_keeps_a_share_of_its_first_advantage_if_asked():
    memory = buffer(1, recompute_advantage=lambda *given: decayed(*given, factor=0.5))
    memory.update(five_groups(), context(0))
    worth = set()
    for seed in range(20):
        again = buffer(1, recompute_advantage=lambda *given: decayed(*given, factor=0.5))
        again.load_state_dict(memory.state_dict(), context(0))
        worth |= set(again.sample(context(1, seed)).advantages[:, -1].tolist())
    assert worth == {0.1, 0.25, 0.05}


def test_rows_expire_before_they_can_be_recalled():
    memory = buffer(1, tolerance=2)
    fill(memory, 4)
    assert memory.sample(context(3)) is None
    assert memory.metrics()["size"] == 0
    fill(memory, 4, step=4)
    assert memory.sample(context(6)) is not None
    assert memory.metrics()["age_max"] == memory.metrics()["age_mean"] == 2


def test_the_released_order_lets_rows_grow_two_steps_older():
    ages = set()
    for seed in range(30):
        memory = buffer(1, tolerance=2, released=True)
        for step in range(4):
            fill(memory, 2, step)
        memory.sample(context(4, seed))
        ages.add(memory.metrics()["age_max"])
    # When step 3 was kept, the newest was 2, and so 0 stayed.
    assert ages == {1, 2, 3, 4}


def test_a_return_at_the_baseline_is_recalled_as_released_only():
    returns, found = (1.0, 1.0, 1.0, 0.1 + 0.2, 0.3), {}
    for released in (False, True):
        worth = set()
        for seed in range(30):
            memory = buffer(1, released=released)
            groups = [[episode(f"{i}", value)] for i, value in enumerate((*returns, 0.3, 0.3, 0.3, 0.3))]
            memory.update(rollout(groups, [0.5] * 5 + [0.0] * 4), context(0))
            worth |= set(memory.sample(context(1, seed)).advantages[:, -1].tolist())
        found[released] = worth
    # .1 + .2 is above .3 by its rounding: that is no gain.
    assert found == {False: {0.7}, True: {0.0, 0.7}}


@pytest.mark.parametrize("released", [False, True])
def test_baselines_are_forgotten_one_by_one_and_as_released_by_whole_steps(released):
    memory = buffer(baselines=4, released=released)
    for step, means in enumerate([(9.0, 1.0), (2.0, 3.0), (5.0,)]):
        groups = [[episode(f"{step}.{number}", mean)] for number, mean in enumerate(means)]
        memory.update(rollout(groups, [0.0] * len(means)), context(step))
    assert memory.state_dict()["baselines"] == ([2, 3, 5] if released else [1, 2, 3, 5])
    assert memory.state_dict()["baseline_steps"] == ([2, 1] if released else [1, 2, 1])
    restored = buffer(baselines=4, released=released)
    restored.load_state_dict(memory.state_dict(), context(3))
    assert restored.state_dict() == memory.state_dict()
    memory.sample(context(3))
    assert memory.metrics()["baseline"] == (3 if released else 2.5)


def test_the_newest_step_is_never_forgotten_as_released():
    memory = buffer(baselines=2, released=True)
    for step, means in enumerate([(9.0,), (1.0, 2.0, 3.0)]):
        memory.update(
            rollout([[episode(f"{step}.{m}", m)] for m in means], [0.0] * len(means)), context(step)
        )
    assert memory.state_dict()["baselines"] == [1, 2, 3]


def test_a_state_from_before_baselines_knew_their_steps_is_read():
    memory = buffer(baselines=2)
    memory.load_state_dict({"policy": None, "rows": [], "baselines": [1.0, 2.0]}, context(0))
    fill(memory, 1)
    assert len(memory.state_dict()["baselines"]) == 2


def test_a_burst_empties_the_memory_and_a_mixture_does_not():
    for mixed in (False, True):
        memory = buffer(2, mixed=mixed)
        fill(memory, 6)
        replayed = memory.sample(context(1))
        assert replayed.mixed is mixed
        assert memory.metrics()["size"] == (6 if mixed else 0)
        assert (memory.sample(context(2)) is not None) is mixed


def test_while_the_coefficient_is_zero_nothing_is_recalled_or_forgotten():
    memory = buffer(1, coefficient=lambda context: 0.5 * (context.step > 1))
    fill(memory, 4)
    assert memory.sample(context(1)) is None
    assert memory.metrics()["size"] == 4
    assert memory.sample(context(2)).coefficient == 0.5


def test_what_a_mask_leaves_out_or_is_not_admitted_is_not_kept():
    memory = buffer(1, episode_filter=lambda episode: episode.id != "no")
    mini = earning([episode(name, 1.0) for name in ("yes", "no", "sure")])
    first = torch.arange(mini.batch.tokens.shape[1]).expand_as(mini.batch.tokens) == 1
    memory.update(replace(mini, mask=first & mini.batch.action_mask), context(0))
    assert memory.metrics()["kept_share"] == pytest.approx(2 / 6)
    replayed = memory.sample(context(1))
    assert replayed.batch.action_mask.tolist() == [[False, True, False]]
    assert replayed.advantages.tolist() == [[0, 1, 0]]


def turns_of_two(layout: Layout) -> MiniBatch:
    """Two trajectories of return 1 with three turns, of which the middle one has a negative advantage."""
    allowed = ((7, 9), (8,), (7, 8, 9))
    members = [episode(name, 1.0, [(7, 8, 9)] * 3, allowed=allowed) for name in "ab"]
    mini = earning(members, layout)
    middle = (mini.batch.turns == 1) & mini.batch.action_mask
    return replace(mini, advantages=torch.where(middle, -1.0, mini.advantages))


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_a_kept_row_holds_its_good_decisions_and_nothing_about_the_others(layout):
    memory = buffer(2 if layout == "turn" else 1)
    memory.update(turns_of_two(layout), context(0))
    assert memory.metrics()["size"] == (4 if layout == "turn" else 2)
    batch = memory.sample(context(1)).batch
    assert set(batch.turns[batch.action_mask].tolist()) <= {0, 2}
    if layout == "trajectory":
        assert batch.tokens.tolist() == [[1, 7, 8, 9, 1, 7, 8, 9, 1, 7, 8, 9]]
        assert batch.action_mask.nonzero()[:, 1].tolist() == [1, 3, 9, 11]
        assert batch.allowed.positions.tolist() == [1, 3, 9, 11]
        assert batch.allowed.ids.tolist() == [[7, 9, -1], [7, 8, 9], [7, 9, -1], [7, 8, 9]]
    place = torch.zeros_like(batch.action_mask)
    place[batch.allowed.rows, batch.allowed.positions] = True
    assert torch.equal(place, batch.action_mask)
    stored = {"logprobs": -0.5, "old_logprobs": -0.6, "entropies": 0.5, "old_entropies": 0.6}
    for name, value in stored.items():
        torch.testing.assert_close(getattr(batch, name), torch.where(batch.action_mask, value, 0.0))


def test_rows_keep_their_token_statistics_through_a_checkpoint():
    def with_statistics(mini):
        batch = mini.batch
        extras = {"topk:2": torch.stack([batch.old_logprobs.exp(), batch.turns / 8], dim=-1)}
        return replace(mini, batch=replace(batch, extras=extras | {"entropy_change": batch.entropies / 2}))

    memory = buffer(2, mixed=True)
    memory.update(with_statistics(turns_of_two("turn")), context(0))
    restored = buffer(2, mixed=True)
    restored.load_state_dict(memory.state_dict(), context(1))
    for each in (memory, restored):
        batch = each.sample(context(1)).batch
        wanted = torch.where(batch.action_mask, batch.old_logprobs.exp(), 0.0)
        torch.testing.assert_close(token_statistic(batch, "topk:2")[..., 0], wanted)
        assert token_statistic(batch, "topk:2").shape == (*batch.tokens.shape, 2)
        assert not token_statistic(batch, "topk:2")[~batch.action_mask].any()
        torch.testing.assert_close(token_statistic(batch, "entropy_change"), batch.entropies / 2)


def test_rows_that_were_stored_before_a_statistic_was_asked_for_are_sampled_without_it():
    memory = buffer(5, mixed=True)
    memory.update(turns_of_two("turn"), context(0))
    mini = turns_of_two("turn")
    memory.update(replace(mini, batch=replace(mini.batch, extras={"x": mini.batch.entropies})), context(1))
    assert memory.sample(context(2)).batch.extras == {}


def test_rows_of_one_trajectory_stay_together_and_those_of_another_step_apart():
    memory = buffer(5, mixed=True)
    for step in (0, 1):
        memory.update(turns_of_two("turn"), context(step))
    replayed = memory.sample(context(2))
    batch = replayed.batch
    # Five of the eight rows: two of each of two trajectories of each of two steps.
    assert len({episode.id for episode in batch.episodes}) == len(batch.episodes) >= 3
    assert max(torch.bincount(batch.trajectory)) == 2
    parts = list(mini_batches(batch, 2, 2, 0))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(batch.lengths)))
    owners = [set(batch.trajectory[part].tolist()) for part in parts]
    assert not owners[0] & owners[1]
    for owner, episode in enumerate(batch.episodes):
        assert episode.task == f"task of {episode.id[0]}"
        assert batch.returns[owner] == 1.0


def random_rollout(draw: random.Random, step: int, layout: Layout) -> MiniBatch:
    groups = [
        [
            episode(
                f"{step}.{number}.{member}",
                draw.choice((0.0, 0.3, 1.0)),
                [[draw.randrange(50) for _ in range(draw.randint(1, 3))] for _ in range(draw.randint(1, 3))],
            )
            for member in range(4)
        ]
        for number in range(3)
    ]
    mini = rollout(groups, [0.0] * 12, layout)
    noise = torch.tensor([[draw.choice((-1.0, 0.0, 0.7)) for _ in row] for row in mini.batch.tokens.tolist()])
    return replace(mini, advantages=torch.where(mini.batch.action_mask, noise, 0.0))


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_bad_now_or_then_and_nothing_too_old_is_ever_recalled(layout, mixed):
    draw, bursts = random.Random(3), 0
    memory = buffer(3, tolerance=2, mixed=mixed)
    then: dict[tuple[str, int, int], float] = {}
    for step in range(40):
        mini = random_rollout(draw, step, layout)
        replayed = memory.sample(context(step))
        if replayed is not None:
            bursts += 1
            batch, worth = replayed.batch, replayed.advantages
            assert (worth[batch.action_mask] > 0).all()
            assert (worth[~batch.action_mask] == 0).all()
            beyond = torch.arange(worth.shape[1]) >= batch.lengths[:, None]
            assert (batch.turns[beyond] == -1).all()
            assert not batch.action_mask[beyond].any()
            for row, position in batch.action_mask.nonzero().tolist():
                name, kept = batch.episodes[int(batch.trajectory[row])].id.split("@")
                assert step - int(kept) <= 2
                assert then[name, int(batch.turns[row, position]), position] > 0
        for row, position in mini.batch.action_mask.nonzero().tolist():
            name = mini.batch.episodes[int(mini.batch.trajectory[row])].id
            turn = int(mini.batch.turns[row, position])
            then[name, turn, position] = float(mini.advantages[row, position])
        memory.update(mini, context(step))
    assert bursts > 5


def same(one: ReplayBatch, other: ReplayBatch) -> bool:
    fields = ("tokens", "lengths", "action_mask", "logprobs", "entropies", "turns", "trajectory", "returns")
    fields += ("old_logprobs", "old_entropies")
    return (
        all(torch.equal(getattr(one.batch, name), getattr(other.batch, name)) for name in fields)
        and one.batch.episodes == other.batch.episodes
        and torch.equal(one.advantages, other.advantages)
    )


def test_a_stored_memory_recalls_the_same_bits():
    memory, draw = buffer(3), random.Random(1)
    for step in range(3):
        memory.update(random_rollout(draw, step, "turn"), context(step))
    memory.update(turns_of_two("turn"), context(3))
    stream = io.BytesIO()
    torch.save(memory.state_dict(), stream)
    stream.seek(0)
    restored = buffer(3)
    restored.load_state_dict(torch.load(stream, weights_only=True), context(4))
    one, other = memory.sample(context(4)), restored.sample(context(4))
    assert same(one, other)
    assert memory.metrics() == {**restored.metrics(), "kept_share": memory.metrics()["kept_share"]}
    assert memory.state_dict() == restored.state_dict() == {**memory.state_dict(), "rows": []}


def test_a_memory_is_not_larger_than_its_rows():
    memory = buffer(1)
    long = episode("long", 0.0, [list(range(40))])
    memory.update(rollout([[episode("a", 1.0), long], [long]], [0.5, -0.5, 0]), context(0))
    (row,) = memory.state_dict()["rows"]
    held = [values.untyped_storage().nbytes() // values.itemsize for values in row["tokens"].values()]
    assert held == [3] * len(held)


@pytest.mark.parametrize("other", [{"tokenizer": "xyz"}, {"vocabulary": 51}])
def test_a_memory_of_other_tokens_is_refused(other):
    memory = buffer()
    fill(memory, 1)
    with pytest.raises(CheckpointError, match=r"replay: \(tokenizer, vocabulary\) is \('abc', 50\), wanted"):
        buffer().load_state_dict(memory.state_dict(), Context(**(POLICY | other)))
    buffer().load_state_dict(buffer().state_dict(), Context(**(POLICY | other)))


@pytest.mark.parametrize("state", [{}, {"policy": None, "rows": [{"step": 1}], "baselines": []}])
def test_what_is_no_memory_is_refused(state):
    with pytest.raises(CheckpointError, match="not the state of a replay buffer"):
        buffer().load_state_dict(state, context(0))


def test_what_is_recalled_follows_from_seed_and_step_and_not_from_the_order_of_rows():
    def names(order: Sequence[int], step: int, seed: int) -> set[str]:
        memory = buffer(4)
        good = earning([episode(str(number), 1.0) for number in range(12)])
        memory.update(good.select(torch.tensor([*order, 12, 13, 14])), context(0))
        return set(recalled(memory.sample(context(step, seed))))

    straight, shuffled = list(range(12)), random.Random(0).sample(range(12), 12)
    drawn = [names(straight, step, seed) for step in (1, 2) for seed in range(4)]
    assert drawn == [names(shuffled, step, seed) for step in (1, 2) for seed in range(4)]
    assert len(set(map(frozenset, drawn))) > 4
