import torch
from toy_policy import make_groups

from agentrl.data.batch import collate
from agentrl.learn.packing import micro_batches, mini_batches


def test_parts_hold_the_budget_and_every_row_once():
    lengths = torch.tensor([5, 0, 9, 3, 4, 12])
    parts = [part.tolist() for part in micro_batches(lengths, 10)]
    # longest first: 12 alone (over the budget), 9, then 5 + 4, then 3
    assert parts == [[5], [2], [0, 4], [3]]


def test_rows_without_decisions_are_in_no_part():
    assert micro_batches(torch.tensor([0, 0]), 10) == []


def test_mini_batches_deal_out_whole_trajectories_evenly():
    batch = collate(make_groups(groups=5, size=4), layout="turn")
    parts = list(mini_batches(batch, 3, step=2, epoch=0))
    owners = [set(batch.trajectory[rows].tolist()) for rows in parts]
    assert sorted(len(owner) for owner in owners) == [6, 7, 7]
    assert set().union(*owners) == set(range(20))
    assert sorted(row for rows in parts for row in rows.tolist()) == list(range(len(batch.lengths)))


def test_the_deal_depends_on_step_and_epoch_and_on_no_row_order():
    batch = collate(make_groups())

    def deal(batch, step, epoch):
        parts = mini_batches(batch, 2, step, epoch)
        return [{batch.episodes[index].id for index in batch.trajectory[rows].tolist()} for rows in parts]

    assert deal(batch, 0, 0) == deal(batch, 0, 0)
    assert deal(batch, 0, 0) != deal(batch, 0, 1)
    assert deal(batch, 0, 0) != deal(batch, 1, 0)
    assert deal(batch.select(list(range(len(batch.lengths)))[::-1]), 0, 0) == deal(batch, 0, 0)
    assert deal(collate(make_groups()[::-1]), 0, 0) == deal(batch, 0, 0)


def test_more_mini_batches_than_trajectories_leave_none_empty():
    batch = collate(make_groups(groups=1, size=2))
    assert all(len(rows) for rows in mini_batches(batch, 5, 0, 0))
