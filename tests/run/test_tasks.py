"""Tasks of several environments: drawn exactly by weight, each environment's own in its own order."""

from collections import Counter
from itertools import islice

import pytest

from agentrl.run.tasks import MixedTasks, TaskOrder, WeightedTurns, random_tasks, task_order, tasks_of
from agentrl.seeds import derive_seed

TASKS = {"games": ["train/0", "train/1", "train/2"], "sums": ["0", "1"]}


def mixed(**weights: float) -> MixedTasks:
    return MixedTasks(TASKS, weights or {"games": 2, "sums": 1})


@pytest.mark.parametrize(
    ("weights", "period"),
    [
        ({"a": 2, "b": 1}, {"a": 2, "b": 1}),
        ({"a": 0.5, "b": 0.2, "c": 0.3}, {"a": 5, "b": 2, "c": 3}),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}),
        ({"a": 97, "b": 2, "c": 1}, {"a": 97, "b": 2, "c": 1}),
        ({"a": 4, "b": 2}, {"a": 2, "b": 1}),
    ],
)
def test_turns_are_exactly_by_weight_and_never_far_from_it(
    weights: dict[str, float], period: dict[str, int]
) -> None:
    turns, total = WeightedTurns(weights), sum(period.values())
    for periods in (1, 2, 3):
        assert Counter(turns[place][0] for place in range(periods * total)) == {
            name: periods * count for name, count in period.items()
        }
    taken: Counter[str] = Counter()
    for place in range(2 * total):
        taken[turns[place][0]] += 1
        assert all(taken[name] - (place + 1) * count / total < 1 for name, count in period.items())


def test_a_turn_knows_how_many_the_name_has_had_wherever_one_enters() -> None:
    turns = WeightedTurns({"a": 3, "b": 2})
    had: Counter[str] = Counter()
    for place in range(20):
        name, before = WeightedTurns({"a": 3, "b": 2})[place]
        assert (name, before) == turns[place] == (name, had[name])
        had[name] += 1


def test_a_small_step_holds_the_shares() -> None:
    order = task_order(mixed(games=3, sums=1), 0)
    for step in range(5):
        drawn = [order[place] for place in range(4 * step, 4 * step + 4)]
        assert Counter(task.partition("/")[0] for task in drawn) == {"games": 3, "sums": 1}


def test_each_environment_has_every_task_once_per_epoch_under_its_name() -> None:
    order = task_order(mixed(), 5)
    drawn = [order[place] for place in range(9)]
    games = [task for task in drawn if task.startswith("games/")]
    assert sorted(games[:3]) == sorted(games[3:]) == ["games/train/0", "games/train/1", "games/train/2"]
    own = TaskOrder(TASKS["games"], derive_seed(5, "games"))
    assert games == [f"games/{own[place]}" for place in range(6)]
    assert [task for task in drawn if task.startswith("sums/")][:2] in (
        ["sums/0", "sums/1"],
        ["sums/1", "sums/0"],
    )


def test_the_tasks_are_those_of_all_environments_one_after_the_other() -> None:
    tasks = mixed()
    names = ["games/train/0", "games/train/1", "games/train/2", "sums/0", "sums/1"]
    assert (list(tasks), len(tasks), tasks[-1], tasks[1:4]) == (names, 5, "sums/1", names[1:4])
    assert tasks_of(tasks, {"sums"})[:] == ["sums/0", "sums/1"]  # type: ignore[comparison-overlap]
    assert tasks_of(["own"], {"sums"}) == ["own"]
    with pytest.raises(IndexError):
        tasks[5]


def test_random_draws_follow_the_shares_and_one_environments_draws_no_others() -> None:
    drawn = list(islice(random_tasks(mixed(), 0, "demonstration"), 30))
    assert Counter(task.partition("/")[0] for task in drawn) == {"games": 20, "sums": 10}
    reweighted = list(islice(random_tasks(mixed(games=1, sums=1), 0, "demonstration"), 30))
    of_sums = [[task for task in each if task.startswith("sums/")] for each in (drawn, reweighted)]
    assert of_sums[0] == of_sums[1][:10]
