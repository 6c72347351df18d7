"""Several panels: each is played as if it were alone, and one that fails does not stop the others."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gymnasium
import pytest
from prize_doors import ENV, Doors
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import Episode
from agentrl.env import Panel, make_panel, register
from agentrl.env.registry import check_id
from agentrl.errors import AgentRLError, ConfigError, PanelError, missing_extra
from agentrl.evaluation.evaluate import evaluate
from agentrl.evaluation.fingerprint import check_alike, panel_fingerprint, policy_fingerprint
from agentrl.evaluation.panel_lists import OpenedPanel, configured_panels, open_panels, panel_labels
from agentrl.evaluation.panels_table import table_rows
from agentrl.evaluation.several import PanelScore, play_one_of_several
from agentrl.evaluation.statistics import pass_at_k, pass_hat_k, pass_rate, powers_of_two, wilson
from agentrl.evaluation.suite import Results, evaluate_panels
from agentrl.evaluation.suites import read_suite, shipped_suites
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
    scores = [play_one_of_several(each, RandomPlayer(), inline, **options) for each in opened(*entries)]
    return {score.label: score for score in scores}


# pass@k and pass^k.


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 1), (4, 1, 2), (4, 3, 2), (4, 4, 4), (6, 2, 3), (2, 2, 1)])
def test_the_estimators_are_the_mean_over_all_choices_of_k_plays(n: int, c: int, k: int) -> None:
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
        assert score.evaluation == replace(alone, fingerprint=None)
    assert len(episodes) == 2 * (6 + 5 + 3)


def test_an_entry_takes_the_held_out_split_and_as_many_tasks_as_there_are() -> None:
    (found,) = opened(PanelConfig(ENV))
    assert found.panel == make_panel(ENV, "held_out", 10)
    assert found.data == "made up"


def test_a_configuration_lists_panels_and_files(tmp_path: Path) -> None:
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
    def fail(self: Any, **kwargs: Any) -> None:
        raise missing_extra("Doors needs Ray", "ray")

    monkeypatch.setattr(Doors, "__init__", fail)
    (found,) = opened(PanelConfig(ENV))
    assert (found.panel, found.error) == (
        None,
        "Doors needs Ray: pip install -e '.[ray]' (in agentrl's checkout)",
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


# Policies, folders and comparisons.


def evaluated(output: Path | None = None, policies: Any = ("random", "expert"), **options: Any) -> Results:
    given: dict[str, Any] = {"envs": (ENV, TWIN), "tasks": 4, "repeats": 2, "placement": "inline"}
    return evaluate_panels(policies, **given | options, output=output)


def test_several_policies_stand_side_by_side_without_a_mean_over_environments() -> None:
    found = evaluated()
    rows = table_rows(found.scores)
    assert [row.label for row in rows if row.heading] == [ENV, TWIN]
    assert [row.label for row in rows[:7]] == [
        ENV,
        "pass@2",
        "pass^2",
        "mean return",
        "turns",
        "left",
        "right",
    ]
    assert {len(row.cells) for row in rows} == {2}
    assert rows[0].cells[1] == "100.0 [51, 100]"
    assert f"| **{TWIN}** |" in found.to_markdown()
    assert (
        json.loads(json.dumps(found.to_dict(), allow_nan=False))["policies"]["expert"][ENV]["error"] is None
    )
    alone = evaluate("expert", env=TWIN, tasks=4, repeats=2, placement="inline")
    assert found.scores["expert"][1].evaluation == alone


def test_an_interrupted_evaluation_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = evaluated()
    ended: list[str] = []

    def stop(episode: Episode) -> None:
        ended.append(episode.id)
        if len(ended) == 21:  # random has played both panels, expert five episodes of the first
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "scores", on_episode=stop)
    assert len(list((tmp_path / "scores" / "episodes").rglob("*.parquet"))) == 3
    again: list[Episode] = []
    found = evaluated(tmp_path / "scores", on_episode=again.append)
    assert len(again) == 2 * 2 * 2 * 4 - 21
    assert found == whole
    assert evaluated(tmp_path / "scores", on_episode=again.append) == whole
    assert len(again) == 2 * 2 * 2 * 4 - 21
    files = {path.name for path in (tmp_path / "scores").iterdir()}
    assert files == {"evaluation.json", "episodes", "results.json", "results.md"}
    stored = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert (
        stored["policies"]["random"][ENV]["evaluation"]["panel_hash"] == make_panel(ENV, "held_out", 4).hash
    )
    assert (
        len(read_episodes(tmp_path / "scores" / "episodes" / "expert" / f"{quote(TWIN, safe='')}.parquet"))
        == 8
    )


def test_an_aborted_episode_is_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Doors, "breaks", ("held_out-left-0",))
        first = evaluated(tmp_path / "scores", ("expert",), envs=(ENV,))
        assert first.scores["expert"][0].evaluation is not None
        assert first.scores["expert"][0].evaluation.aborted == 2
        assert any("aborted 1 x env_error: RuntimeError: the door is stuck" in note for note in first.notes)
    again: list[Episode] = []
    assert evaluated(tmp_path / "scores", ("expert",), envs=(ENV,), on_episode=again.append) == evaluated(
        None, ("expert",), envs=(ENV,)
    )
    assert [episode.task for episode in again] == ["held_out-left-0"] * 2


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"repeats": 3}, "repeats was 2, is 3"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"tasks": 3}, r"panel 1\.tasks was 4, is 3"),
        ({"envs": (TWIN, ENV)}, rf'panel 1\.env was "{ENV}", is "{TWIN}"'),
        ({"policies": ("random",)}, r'expert\.policy\.name was "expert", is null'),
        ({"overrides": ("rollout.max_turns=1",)}, r"random\.panel\.max_turns was null, is 1"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    evaluated(tmp_path / "scores")
    with pytest.raises(ConfigError, match=difference):
        evaluated(tmp_path / "scores", **changed)


def test_tasks_that_changed_in_between_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(tmp_path / "scores")
    monkeypatch.setattr(Doors, "salt", "new")
    with pytest.raises(ConfigError, match=rf"panel {ENV} was \w+…, is \w+…"):
        evaluated(tmp_path / "scores")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files and no evaluation"):
        evaluated(tmp_path)


def test_a_policy_without_an_expert_is_said_in_its_own_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clueless(Doors):
        def __init__(self, split: str = "train", max_steps: int = 3) -> None:
            super().__init__(split, max_steps)

    register("agentrl-tests/Clueless-v0", Clueless)
    try:
        found = evaluated(envs=("agentrl-tests/Clueless-v0", ENV))
    finally:
        gymnasium.registry.pop("agentrl-tests/Clueless-v0")
    random, expert = found.scores["random"][0], found.scores["expert"][0]
    assert random.evaluation is not None
    assert expert.evaluation is None
    row, reason = table_rows(found.scores)[:2]
    assert row.cells[1] == "–"
    assert reason.label.startswith("not played by expert: ")
    assert found.scores["expert"][1].evaluation is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": ()}, "policies are none; wanted at least one"),
        ({"policies": ("random", "random")}, "wanted at least one, each once"),
        ({"suite": "text_games"}, "given together"),
        ({"envs": (), "suite": "text_game"}, "did you mean text_games"),
        ({"envs": (), "suite": "text_games", "split": "test"}, "split is test"),
        ({"envs": (ENV,), "split": "heldout"}, "did you mean 'held_out'"),
        ({"env_kwargs": {"max_steps": 1}}, "max_steps: arguments of an environment need exactly one"),
        ({"tasks": 0}, "tasks is 0, wanted at least 1"),
        ({"repeats": 0}, "repeats is 0, wanted at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_played(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    episodes: list[Episode] = []
    with pytest.raises(ConfigError, match=message):
        evaluated(tmp_path / "scores", **arguments, on_episode=episodes.append)
    assert episodes == []


# Suites.


def test_a_suite_lists_panels_and_files_beside_it(tmp_path: Path) -> None:
    make_panel(ENV, "train", 5).save(tmp_path / "doors.json")
    (tmp_path / "mine.yaml").write_text(
        f"panels: [doors.json, {{env: {TWIN}, tasks: 2}}, {{env: no/Such-v0}}]"
    )
    found = evaluated(envs=(), suite=tmp_path / "mine.yaml", tasks=None)
    played = [score.evaluation and score.evaluation.success.episodes for score in found.scores["random"]]
    assert played == [10, 4, None]
    assert "no/Such-v0' is unknown" in (found.scores["random"][2].error or "")
    fewer = evaluated(envs=(), suite=tmp_path / "mine.yaml", tasks=1)
    assert [score.evaluation and score.evaluation.success.episodes for score in fewer.scores["random"]][
        :2
    ] == [2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("panels: []", "panels is empty"),
        ("", r"panels: is missing"),
        ("panels: [{env: a, task: 3}]", r"panels\.0\.task: unknown key"),
        ("panels: [gone.json]", "gone.json cannot be read"),
    ],
)
def test_a_malformed_suite_is_refused_with_its_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(AgentRLError, match=message):
        read_suite(tmp_path / "mine.yaml")


def test_every_shipped_suite_names_registered_environments() -> None:
    assert shipped_suites() == ["text_games"]
    for name in shipped_suites():
        for entry in read_suite(name):
            check_id(entry.env)


# Fingerprints.


def test_scores_of_other_panels_prompts_or_decodings_are_not_compared() -> None:
    def of(**changes: Any) -> dict[str, Any]:
        config = load_config(None, *changes.pop("overrides", ()))
        known = policy_fingerprint("random", config, 1.0, changes.pop("seed", 0))
        return known | panel_fingerprint(
            make_panel(ENV, "train", changes.pop("tasks", 2)), "made up", 1, None
        )

    model = of() | {"policy": {"name": "a"}, "dtype": "float32", "prompt": {"text": "1", "history": None}}
    check_alike({"a": model, "b": model | {"policy": {"name": "b"}}, "random": of()})
    for other, line in (
        (of(tasks=3), r"panel: \w{12}… for a, \w{12}… for b"),
        (of(seed=1), r"seed: 0 for a, 1 for b"),
        (model | {"dtype": "bfloat16"}, r'policy\.dtype: "float32" for a, "bfloat16" for b'),
        (model | {"prompt": {"text": "2"}}, r'text of policy\.prompt: "1" for a, "2" for b'),
        (model | {"prompt": {"text": "1", "history": 2}}, r"policy\.history: null for a, 2 for b"),
        (model | {"data": None}, r'data: "made up" for a, null for b'),
        (model | {"agentrl": "9"}, r"agentrl: "),
    ):
        with pytest.raises(ConfigError, match=line):
            check_alike({"a": model, "b": other})
    check_alike({"a": model, "b": model | {"dtype": "bfloat16"}}, varying=["dtype"])


def test_every_result_says_what_it_was_measured_with() -> None:
    found = evaluate("random", env=ENV, tasks=2, placement="inline").fingerprint
    assert found is not None
    assert found["panel"]["hash"] == make_panel(ENV, "held_out", 2).hash
    assert (found["agentrl"], found["data"], found["policy"]) == (
        agentrl.__version__,
        "made up",
        {"name": "random"},
    )


# The command.


def test_the_command_prints_one_table_and_writes_a_folder(tmp_path: Path) -> None:
    words = [
        "evaluate",
        "--policy",
        "random",
        "--policy",
        "expert",
        "--env",
        ENV,
        "--env",
        TWIN,
        "--tasks",
        "2",
    ]
    answer = CliRunner().invoke(
        app, [*words, "--placement", "inline", "--output", str(tmp_path / "scores")], env={"COLUMNS": "120"}
    )
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.count("success %") == 1
    assert f"{TWIN}: 2 tasks of held_out, panel {make_panel(TWIN, 'held_out', 2).hash[:12]}" in answer.stdout
    assert (tmp_path / "scores" / "results.md").is_file()
    file = CliRunner().invoke(app, [*words, "--placement", "inline", "--output", str(tmp_path / "all.json")])
    assert file.exit_code == 0, file.output
    assert set(json.loads((tmp_path / "all.json").read_text())["policies"]) == {"random", "expert"}


def test_the_command_takes_the_panels_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"evaluation: {{panels: [{{env: {ENV}, tasks: 2}}, {{env: {TWIN}, tasks: 3}}]}}"
    )
    words = [
        "evaluate",
        "--policy",
        "expert",
        "--config",
        str(tmp_path / "mine.yaml"),
        "--placement",
        "inline",
    ]
    answer = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert answer.exit_code == 0, answer.output
    assert f"{TWIN}: 3 tasks" in answer.stdout


def test_nothing_played_exits_with_1_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("panels: [{env: no/Such-v0}]")
    answer = CliRunner().invoke(
        app, ["evaluate", "--policy", "random", "--suite", str(tmp_path / "mine.yaml")]
    )
    assert answer.exit_code == 1
    assert "not played" in answer.stdout


def test_a_single_panel_is_printed_as_ever() -> None:
    words = ["evaluate", "--policy", "expert", "--env", ENV, "--tasks", "2", "--placement", "inline"]
    answer = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.splitlines()[2].split() == [
        "policy",
        "decoding",
        "success",
        "%",
        "left",
        "right",
        "turns",
    ]
    assert "pass@" not in answer.stdout
    repeated = CliRunner().invoke(app, [*words, "--repeats", "2"], env={"COLUMNS": "120"})
    assert "pass@2 100.0 [34.2, 100.0], pass^2 100.0 [34.2, 100.0]" in repeated.stdout
