"""Several panels: each is played as if it were alone, and one that fails does not stop the others."""

from collections.abc import Iterator
from math import comb
from typing import Any

import gymnasium
import pytest
from prize_doors import ENV, Doors

from agentrl.data.trajectory import Episode
from agentrl.env import Panel, make_panel, register
from agentrl.errors import ConfigError, PanelError
from agentrl.evaluation.evaluate import evaluate
from agentrl.evaluation.panel_lists import OpenedPanel, configured_panels, open_panels, panel_labels
from agentrl.evaluation.several import PanelScore, play_panels
from agentrl.evaluation.statistics import pass_at_k, pass_hat_k, pass_rate, powers_of_two, wilson
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.settings import PanelConfig, RunConfig, config_from_tree, config_tree, load_config

TWIN = "agentrl-tests/TwinDoors-v0"
register(TWIN, Doors)


def inline(env: str) -> RolloutConfig:
    return RolloutConfig(placement="inline")


def opened(*entries: Any, tolerant: bool = False) -> tuple[OpenedPanel, ...]:
    return open_panels(entries, RunConfig(), inline, tolerant=tolerant)


def plays(*entries: Any, **options: Any) -> dict[str, PanelScore]:
    scores = play_panels(opened(*entries), RandomPlayer(), inline, **options)
    return {score.label: score for score in scores}


# pass@k and pass^k.


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 1), (4, 1, 2), (4, 3, 2), (4, 4, 4), (6, 2, 3), (2, 2, 1)])
def test_the_estimators_are_the_mean_over_all_choices_of_k_plays(n: int, c: int, k: int) -> None:
    from itertools import combinations

    chosen = list(combinations([True] * c + [False] * (n - c), k))
    assert len(chosen) == comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert pass_hat_k(n, c, k) == pytest.approx(sum(map(all, chosen)) / len(chosen))


def test_a_pass_rate_is_a_mean_over_tasks_with_an_interval_over_tasks() -> None:
    tasks = [[True, True, False, False], [False] * 4, [True] * 4]
    found = pass_rate(tasks, 2, pass_at_k)
    assert (found.mean, found.tasks) == (pytest.approx((5 / 6 + 0 + 1) / 3), 3)
    assert found.interval[0] <= found.mean <= found.interval[1]
    assert pass_rate(tasks, 1, pass_at_k).mean == pass_rate(tasks, 1, pass_hat_k).mean == pytest.approx(0.5)
    assert pass_rate([[True, True]] * 20, 2, pass_hat_k).interval == wilson(20, 20)


def test_a_task_with_too_few_finished_plays_is_left_out() -> None:
    assert pass_rate([[True], [False, False]], 2, pass_at_k).tasks == 1
    nothing = pass_rate([[True]], 2, pass_at_k)
    assert (nothing.mean, nothing.interval, nothing.tasks) == (None, (0.0, 1.0), 0)
    assert [powers_of_two(most) for most in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_repeats_say_pass_rates_and_single_plays_say_what_they_always_said() -> None:
    once = evaluate("random", env=ENV, tasks=4, split="held_out", placement="inline").to_dict()
    assert not {"pass_at", "pass_hat"} & set(once)
    four = evaluate("random", env=ENV, tasks=4, split="held_out", repeats=5, placement="inline")
    assert list(four.pass_at) == list(four.pass_hat) == [1, 2, 4]
    assert four.pass_at[1].mean == pytest.approx(four.success.success_rate)
    assert list(four.to_dict()["pass_at"]) == ["1", "2", "4"]


# The list.


def test_a_panel_scores_among_others_as_it_does_alone() -> None:
    entries = [PanelConfig(ENV, "held_out", 6), PanelConfig(TWIN, "train", 5), PanelConfig(ENV, "train", 3)]
    episodes: list[Episode] = []
    together = plays(*entries, repeats=2, seed=3, on_episode=episodes.append)
    assert list(together) == [f"{ENV} held_out", TWIN, f"{ENV} train"]
    for entry, score in zip(entries, together.values(), strict=True):
        named: Any = {"env": entry.env, "split": entry.split, "tasks": entry.tasks}
        alone = evaluate("random", **named, repeats=2, seed=3, placement="inline")
        assert score.evaluation == alone
    assert len(episodes) == 2 * (6 + 5 + 3)


def test_an_entry_takes_the_held_out_split_and_as_many_tasks_as_there_are() -> None:
    (found,) = opened(PanelConfig(ENV))
    assert found.panel == make_panel(ENV, "held_out", 10)
    assert found.data == "made up"


def test_a_configuration_lists_panels_and_files(tmp_path: Any) -> None:
    panel = make_panel(ENV, "train", 2)
    panel.save(tmp_path / "panel.json")
    config = load_config(
        None,
        f"evaluation.panels=[{tmp_path / 'panel.json'}, {{env: {TWIN}, tasks: 3, kwargs: {{max_steps: 1}}}}]",
    )
    assert config_from_tree(config_tree(config)) == config
    listed = configured_panels(config)
    assert listed == (panel, PanelConfig(TWIN, None, 3, {"max_steps": 1}))
    assert [found.panel and len(found.panel.tasks) for found in opened(*listed)] == [2, 3]


def test_labels_tell_panels_apart_by_split_then_by_arguments_then_by_number() -> None:
    entries = [
        PanelConfig("a"),
        PanelConfig("b", "x"),
        PanelConfig("b", "y"),
        PanelConfig("c", "x", None, {"n": 1}),
        Panel("c", "x", ("t",), ("0",), {"n": 2}),
        PanelConfig("d", "x"),
        PanelConfig("d", "x"),
    ]
    assert panel_labels(entries) == ["a", "b x", "b y", "c x n=1", "c x n=2", "d x #1", "d x #2"]


@pytest.fixture
def broken() -> Iterator[str]:
    class Broken(Doors):
        def __init__(self, **kwargs: Any) -> None:
            raise RuntimeError("the hinges are gone")

    register("agentrl-tests/Broken-v0", Broken)
    yield "agentrl-tests/Broken-v0"
    gymnasium.registry.pop("agentrl-tests/Broken-v0")


def test_an_environment_that_cannot_be_made_is_a_row_with_the_reason(broken: str) -> None:
    found = plays(PanelConfig(broken), PanelConfig(ENV, tasks=2))
    assert found[broken].evaluation is None
    assert "the hinges are gone" in (found[broken].error or "")
    assert found[ENV].evaluation is not None
    assert found[ENV].evaluation.success.episodes == 2
    assert found[broken].to_dict()["evaluation"] is None


def test_a_missing_package_is_a_row_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from agentrl.errors import missing_extra

    def fail(self: Any, **kwargs: Any) -> None:
        raise missing_extra("Doors needs wood", "wood")

    monkeypatch.setattr(Doors, "__init__", fail)
    (found,) = opened(PanelConfig(ENV))
    assert (found.panel, found.error) == (
        None,
        "Doors needs wood: pip install -e '.[wood]' (in agentrl's checkout)",
    )


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ([], ConfigError, "the list of panels is empty"),
        ([PanelConfig("agentrl-tests/Door-v0")], ConfigError, "did you mean 'agentrl-tests/Doors-v0'"),
        ([PanelConfig(ENV, "heldout")], ConfigError, f"panel {ENV}: .*did you mean 'held_out'"),
        ([PanelConfig(ENV, kwargs={"max_step": 1})], ConfigError, f"panel {ENV}: .*did you mean 'max_steps'"),
        ([PanelConfig(ENV, "train", 11)], PanelError, "has 10 tasks, wanted 11"),
        ([Panel(ENV, "train", ("train-left-0",), ("0",))], PanelError, "other content"),
    ],
)
def test_bad_entries_are_refused_before_anything_is_played(
    entries: list[Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        opened(*entries)
    if entries:
        (found,) = opened(*entries, tolerant=True)
        assert found.panel is None
        assert found.error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluation.panels=[{env: x, tasks: 0}]",
            r"panels\.0\.tasks: wrong value \(got 0, wanted at least 1",
        ),
        ("evaluation.panels=[{env: x, task: 3}]", r"panels\.0\.task: unknown key .*did you mean tasks"),
        ("evaluation.panels=[{split: x}]", r"panels\.0\.env: is missing"),
        ("evaluation.panels=[3]", r"panels\.0: wrong value \(got 3, wanted text or a block of keys\)"),
    ],
)
def test_a_mistake_in_an_entry_is_named_once(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, override)
    assert len(str(caught.value).splitlines()) == 1


def test_one_panel_and_several_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.panel is 'a' beside evaluation\.panels"):
        load_config(None, "evaluation.panel=a", "evaluation.panels=[b]")
