import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prize_doors import ENV, Doors

from agentrl.data.trajectory import Episode, StopReason, Turn
from agentrl.env import Panel, make_panel
from agentrl.errors import ConfigError, PanelError
from agentrl.evaluation.evaluate import evaluate
from agentrl.evaluation.playing import check_instructions, play_panel
from agentrl.evaluation.scores import Evaluation, mean_entropy, summarise
from agentrl.evaluation.statistics import bootstrap_over_tasks, intervals_separate, success_rate, wilson
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import RolloutConfig


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(Doors) as environments:
        yield environments


def episode(task: str, stop: StopReason = StopReason.TERMINATED, **fields: Any) -> Episode:
    return Episode(id=task, env=ENV, task=task, seed=0, turns=fields.pop("turns", ()), stop=stop, **fields)


def panel_of(*tasks: str) -> Panel:
    return Panel(ENV, "train", tasks, ("0" * 64,) * len(tasks), {})


# Statistics.


def test_wilson_is_the_textbook_interval() -> None:
    """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964."""
    assert wilson(22, 62) == pytest.approx((0.25, 0.48), abs=0.005)
    for trials in (1, 7, 240):
        for wins in {0, 1, trials // 2, trials}:
            rate, z2 = wins / trials, 1.959963984540054**2 / trials
            spread = math.sqrt(z2 * rate * (1 - rate) + z2**2 / 4)
            wanted = [(rate + z2 / 2 + sign * spread) / (1 + z2) for sign in (-1, 1)]
            assert wilson(wins, trials) == pytest.approx(wanted, abs=1e-12)


def test_nothing_seen_means_nothing_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    rate = success_rate([])
    assert (rate.success_rate, rate.interval, rate.episodes) == (None, (0.0, 1.0), 0)
    assert bootstrap_over_tasks([[], []]) == (0.0, 1.0)


def test_an_interval_holds_its_rate_at_the_borders() -> None:
    assert wilson(0, 240)[0] == 0.0
    assert wilson(240, 240)[1] == 1.0


def test_repeats_that_always_agree_say_no_more_than_one_play() -> None:
    once = [[index < 30] for index in range(60)]
    repeated = [[index < 30] * 8 for index in range(60)]
    low, high = bootstrap_over_tasks(repeated)
    independent_low, independent_high = wilson(30, 60)
    assert high - low == pytest.approx(independent_high - independent_low, rel=0.1)
    assert success_rate(once).interval == wilson(30, 60)
    assert success_rate(repeated).interval == (low, high)
    assert success_rate(repeated).episodes == 480


def test_the_bootstrap_draws_tasks_and_not_plays() -> None:
    # Two tasks, one always won: a drawn panel has rate 0 (p = 1/4), 1/2 or 1 (p = 1/4).
    assert bootstrap_over_tasks([[True] * 4, [False] * 4]) == (0.0, 1.0)
    assert bootstrap_over_tasks([[True, False]] * 3 + [[True, True]]) == bootstrap_over_tasks(
        [[True, False]] * 3 + [[True, True]]
    )


def test_where_resampling_cannot_vary_the_number_of_tasks_decides() -> None:
    assert success_rate([[True, True]] * 20).interval == wilson(20, 20)
    assert success_rate([[False, False]]).interval == wilson(0, 1)
    assert success_rate([[True, False]] * 20).interval == wilson(10, 20)


def test_intervals_separate_only_without_a_common_point() -> None:
    assert intervals_separate((0.1, 0.2), (0.3, 0.4))
    assert intervals_separate((0.3, 0.4), (0.1, 0.2))
    assert not intervals_separate((0.1, 0.3), (0.3, 0.4))
    assert not intervals_separate((0.1, 0.9), (0.3, 0.4))


# Summaries.


def test_aborted_episodes_are_in_no_rate_and_their_reasons_are_counted() -> None:
    episodes = [
        episode("a", success=True, task_type="x", turns=(Turn("o", "r", reward=2.0),)),
        episode("b", StopReason.TRUNCATED, task_type="x", turns=(Turn("o", "r"),) * 3),
        episode("c", StopReason.ENV_ERROR, task_type="y", error="ValueError: no"),
        episode("d", StopReason.ENV_ERROR, task_type="y", error="ValueError: no"),
    ]
    result = summarise(episodes, panel_of("a", "b", "c", "d"), data="made up")
    assert result.success == success_rate([[True], [False]])
    assert list(result.by_task_type) == ["x"]
    assert (result.aborted, result.aborted_reasons) == (2, {"env_error: ValueError: no": 2})
    assert result.stop_reasons == {"env_error": 2, "terminated": 1, "truncated": 1}
    assert (result.mean_return, result.mean_turns) == (1.0, 2.0)


def test_the_summary_has_the_shape_of_summary_json() -> None:
    panel = panel_of("a", "b")
    tree = json.loads(
        json.dumps(
            summarise(
                [episode("a", success=True, task_type="x"), episode("b", task_type="y")],
                panel,
                data="made up",
            ).to_dict(),
            allow_nan=False,
        )
    )
    assert (tree["success_rate"], tree["episodes"], tree["aborted"]) == (0.5, 2, 0)
    assert tree["interval"] == list(wilson(1, 2))
    assert tree["by_task_type"]["x"] == {"success_rate": 1.0, "interval": list(wilson(1, 1)), "episodes": 1}
    assert (tree["panel_hash"], tree["data"], tree["repeats"]) == (panel.hash, "made up", 1)
    assert set(tree["entropy"]) == {"token", "turn", "trajectory", "by_turn"}
    assert {"mean_return", "mean_turns", "stop_reasons"} <= set(tree)


def test_a_panel_without_a_finished_episode_has_no_rate_and_no_nan() -> None:
    result = summarise([episode("a", StopReason.ENV_ERROR)], panel_of("a"))
    assert result.success.success_rate is None
    assert (result.mean_return, result.mean_turns) == (None, None)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("tasks", [("a",), ("a", "b", "b"), ("a", "b", "c")])
def test_a_panel_that_was_not_played_as_told_is_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="2 tasks is played 1 times"):
        summarise([episode(task) for task in tasks], panel_of("a", "b"))


def test_entropy_is_averaged_at_each_level_over_decisions_only() -> None:
    def turn(*entropies: float, forced: tuple[int, ...] = ()) -> Turn:
        ids = tuple((7,) if place in forced else (7, 8) for place in range(len(entropies)))
        return Turn("o", "r", action_ids=(7,) * len(entropies), entropies=entropies, allowed=ids)

    long = episode("a", turns=(turn(1.0, 3.0), turn(0.5, 9.0, forced=(1,))))
    short = episode("b", turns=(turn(4.0), turn(9.0, forced=(0,))))
    found = mean_entropy([long, short, episode("c", turns=(Turn("o", "r"),))])
    assert found.token == pytest.approx((1 + 3 + 0.5 + 4) / 4)
    assert found.turn == pytest.approx((2 + 0.5 + 4) / 3)
    assert found.trajectory == pytest.approx((1.25 + 4) / 2)
    assert found.by_turn == pytest.approx((3.0, 0.5))
    assert mean_entropy([]).token is None


# Playing.


def test_each_task_is_played_exactly_k_times_with_seeds_of_its_own(pool: EnvironmentPool) -> None:
    panel = make_panel(ENV, "held_out", 4)
    played = play_panel(panel, RandomPlayer(), pool, repeats=3, seed=5).episodes
    assert [one.task for one in played] == [task for task in panel.tasks for _ in range(3)]
    assert len({one.seed for one in played}) == 12
    other = play_panel(panel, RandomPlayer(), pool, repeats=3, seed=6).episodes
    assert not {one.seed for one in played} & {one.seed for one in other}


def test_a_score_depends_on_neither_the_batch_nor_the_other_tasks(pool: EnvironmentPool) -> None:
    panel = make_panel(ENV, "held_out", 10)

    def turns(panel: Panel, max_active: int, repeats: int) -> dict[tuple[str, int], Any]:
        played = play_panel(
            panel, RandomPlayer(), pool, RolloutConfig(max_active=max_active), repeats=repeats
        )
        return {(one.task, one.seed): one.turns for one in played.episodes}

    together, alone = turns(panel, 8, 2), turns(panel, 1, 2)
    few = turns(panel.first(3), 64, 1)
    assert together == alone
    assert few.items() <= together.items()


def test_max_turns_limits_an_evaluation(pool: EnvironmentPool) -> None:
    played = play_panel(make_panel(ENV, "train", 10), RandomPlayer(), pool, RolloutConfig(max_turns=1))
    assert max(len(one.turns) for one in played.episodes) == 1


class _Obedient(RandomPlayer):
    """Opens the door that it is told of."""

    def reply(self, request: Any) -> Any:
        from agentrl.rollout.play import Reply

        return Reply("left" if "left" in request.observation else "right")


class _Stubborn(RandomPlayer):
    """Always opens the left door."""

    def reply(self, request: Any) -> Any:
        from agentrl.rollout.play import Reply

        return Reply("left")


def test_the_instruction_check_tells_reading_from_habit(
    pool: EnvironmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.rollout.play.STORED_INFO", ("success", "task_type", "other_success"))
    panel = make_panel(ENV, "held_out", 10)
    obedient = check_instructions(panel, _Obedient(), pool)
    stubborn = check_instructions(panel, _Stubborn(), pool)
    assert obedient is not None
    assert stubborn is not None
    # The last two of the ten tasks have no other goal.
    assert (obedient.new_goal.success_rate, obedient.old_goal.success_rate, obedient.new_goal.episodes) == (
        1.0,
        0.0,
        8,
    )
    assert (stubborn.new_goal.success_rate, stubborn.old_goal.success_rate) == (0.5, 0.5)
    assert obedient.to_dict()["new_goal"]["interval"] == wilson(8, 8)


def test_an_environment_without_other_goals_has_no_instruction_check(
    pool: EnvironmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Doors, "other_goal")
    assert check_instructions(make_panel(ENV, "train", 2), RandomPlayer(), pool) is None


# `evaluate`, the whole.


def test_the_expert_solves_a_panel_and_the_score_carries_its_label() -> None:
    result = evaluate("expert", env=ENV, split="held_out", tasks=6, repeats=2)
    assert isinstance(result, Evaluation)
    assert (result.success.success_rate, result.success.episodes, result.data) == (1.0, 12, "made up")
    assert list(result.by_task_type) == ["left", "right"]
    assert result.panel_hash == make_panel(ENV, "held_out", 6).hash


def test_a_panel_file_is_played_as_it_was_saved(tmp_path: Path) -> None:
    panel = make_panel(ENV, "train", 4, {"max_steps": 1})
    panel.save(tmp_path / "panel.json")
    seen: list[Episode] = []
    from_file = evaluate("random", tmp_path / "panel.json", seed=3, on_episode=seen.append)
    assert from_file == evaluate("random", panel, seed=3)
    assert from_file.panel_hash == panel.hash
    assert [len(one.turns) for one in seen] == [1] * 4


def test_a_panel_whose_tasks_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_panel(ENV, "train", 2).save(tmp_path / "panel.json")
    monkeypatch.setattr(Doors, "salt", "new")
    with pytest.raises(PanelError, match="other content"):
        evaluate("random", tmp_path / "panel.json")


def test_an_environment_that_fails_costs_its_episode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doors, "breaks", ("train-left-0",))
    result = evaluate("expert", env=ENV, split="train", tasks=4)
    assert (result.success.success_rate, result.success.episodes, result.aborted) == (1.0, 3, 1)
    assert result.aborted_reasons == {"env_error: RuntimeError: the door is stuck": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"panel": panel_of("a"), "tasks": 2}, "give the panel or those, not both"),
        ({"repeats": 0}, "repeats is 0, wanted at least 1"),
        ({"env": ENV, "tasks": 0}, "tasks is 0, wanted at least 1"),
        ({"env": ENV, "split": "heldout"}, "did you mean"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate("random", **arguments)
