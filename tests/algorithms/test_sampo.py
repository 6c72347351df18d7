"""SAMPO: GSPO over GiGPO, with groups that differ and without turns that drifted."""

from collections.abc import Callable

import pytest
from loss_rows import loss_and_slopes, rows
from played import play

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.sampo import SAMPO
from agentrl.data import Group

Build = Callable[..., Algorithm]
OLD = [[-1.0, -2.0, -1.0], [-1.0, -1.0, -1.0]]
NEW = [[-0.9, -2.3, -0.7], [-1.2, -1.1, -0.9]]
ADVANTAGES = [[1.0] * 3, [-1.0] * 3]


@pytest.mark.vector("2026:2")
def test_a_turn_has_one_ratio_and_is_clipped_as_a_whole(build: Build) -> None:
    mini = rows(NEW, OLD, ADVANTAGES)
    algorithm = build("sampo")
    ratio = algorithm.ratio(mini.now, mini)
    assert ratio[:, 1].tolist() == pytest.approx([1.033895, 0.935507], abs=5e-7)
    _, loss, slopes = loss_and_slopes(algorithm, mini)
    assert loss == pytest.approx((-1.004 + 0.997) / 2, abs=1e-12)
    assert slopes == [0] * 6


@pytest.mark.vector("2026:2")
def test_a_bad_turn_that_drifted_is_dropped_and_not_counted(build: Build) -> None:
    mini = rows(NEW, OLD, ADVANTAGES)
    kept, _, _ = loss_and_slopes(build("sampo", drift=0.223), mini)
    assert kept.mask.sum(dim=1).tolist() == [3, 3]
    # mean(olp - lp) of the second is .066667
    dropped, loss, _ = loss_and_slopes(build("sampo", drift=3e-3), mini)
    assert dropped.mask.sum(dim=1).tolist() == [3, 0]
    assert loss == pytest.approx(-1.004, abs=1e-12)


def test_a_good_turn_is_kept_however_far_it_drifted() -> None:
    mini = rows(NEW, OLD, [[1.0] * 3, [1.0] * 3])
    kept, _, _ = loss_and_slopes(SAMPO(drift=3e-3).build(), mini)
    assert bool(kept.mask.sum() == 6)


def test_equal_groups_are_learned_from_in_the_cold_start_only() -> None:
    equal = Group("t0", (play("a", "x", 1.0), play("b", "x", 1.0)))
    differ = Group("t1", (play("c", "x", 1.0), play("d", "x", 0.0)))
    algorithm = SAMPO(cold_start=5, max_rounds=4).build()
    assert algorithm.rollout.rounds == 4
    for step, wanted in ((4, ["t0", "t1"]), (5, ["t1"])):
        found = algorithm.select([equal, differ], Context(step=step))
        assert [group.task for group in found] == wanted
