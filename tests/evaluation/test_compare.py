"""Comparisons of stored scores: paired, refused where the scores are unlike, written as tables and a page."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from math import comb
from pathlib import Path
from typing import Any

import pytest
from prize_doors import ENV, Doors
from shell import ROOT, blocks
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import StopReason
from agentrl.env import register
from agentrl.errors import ConfigError
from agentrl.evaluation.paired import mcnemar, paired_difference, task_means
from agentrl.evaluation.statistics import wilson
from agentrl.evaluation.suite import evaluate_panels

pytestmark = pytest.mark.usefixtures("undrawn")

TWIN = "agentrl-tests/TwinDoors-v0"
register(TWIN, Doors)

TINY = (
    f"env.id={ENV}",
    "evaluation.split=held_out",
    "evaluation.tasks=6",
    "evaluation.repeats=2",
    "evaluation.baselines=[]",
    "warm_start.steps=2",
    "warm_start.batch_size=2",
    "warm_start.demonstrations=4",
    "trainer.steps=1",
    "policy.hidden_size=16",
    "policy.layers=1",
    "policy.heads=1",
    "policy.tokenizer_episodes=2",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "rollout.placement=inline",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs that differ by their method, A and B."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method in (("A", "grpo"), ("B", "rloo")):
        config = agentrl.load_config(
            None, *TINY, f"run.folder={folder}", f"run.name={name}", f"algorithm.name={method}"
        )
        agentrl.train(config, quiet=True)
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def scored(folder: Path, policy: str = "random", **options: Any) -> Path:
    given: dict[str, Any] = {"envs": (ENV,), "tasks": 8, "placement": "inline"}
    evaluate_panels([policy], **given | options, output=folder)
    return folder


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, words)], prog_name="agentrl", env={"COLUMNS": "120"})


def command(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return str(done.output)


def refused(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert len(done.stderr.splitlines()) == 1 or "differ in" in done.stderr
    return str(done.stderr)


# The statistics.


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == mcnemar(3, 3) == mcnemar(1, 0) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    for gained, lost in ((6, 16), (12, 30), (86, 150)):
        n = gained + lost
        tail = sum(comb(n, i) for i in range(gained + 1)) / 2**n
        assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(2 * tail)


def test_a_difference_is_paired_over_tasks() -> None:
    baseline = {f"task-{index:03d}": float(index % 2) for index in range(100)}
    better = {task: 1.0 if index % 10 == 0 else value for index, (task, value) in enumerate(baseline.items())}
    found = paired_difference(better, baseline)
    assert (found.mean, found.tasks, found.gained, found.lost) == (pytest.approx(0.1), 100, 10, 0)
    assert found.p_value == pytest.approx(2 / 2**10)
    # The resampled mean is Binomial(100, 1/10) / 100; unpaired, its interval would be [-0.04, 0.24].
    assert found.interval == pytest.approx((0.05, 0.16), abs=0.011)
    assert paired_difference(baseline, better).mean == pytest.approx(-0.1)


def test_tasks_that_all_differ_alike_do_not_make_a_difference_certain() -> None:
    tasks = {str(index): 1.0 for index in range(10)}
    _, share = wilson(0, 10)
    same = paired_difference(tasks, tasks)
    assert (same.mean, same.p_value) == (0.0, 1.0)
    assert same.interval == pytest.approx((-share, share))
    all_lost = paired_difference(dict.fromkeys(tasks, 0.0), tasks)
    assert all_lost.mean == -1.0
    assert all_lost.interval == pytest.approx((-1.0, -1.0 + 2 * share))
    assert all_lost.p_value == pytest.approx(2 / 2**10)


def test_what_one_did_not_finish_is_left_out_of_the_pair() -> None:
    nothing = float("nan")
    found = paired_difference({"a": 1.0, "b": nothing, "c": 0.5}, {"a": 0.0, "b": 1.0, "c": nothing})
    assert (found.mean, found.tasks, found.gained) == (1.0, 1, 1)
    none = paired_difference({"a": nothing}, {"a": 1.0})
    assert (none.mean, none.interval, none.tasks, none.p_value) == (None, (-1.0, 1.0), 0, 1.0)


# The command, on folders of evaluations.


def test_evaluations_are_compared_task_by_task(tmp_path: Path) -> None:
    random, expert = scored(tmp_path / "random"), scored(tmp_path / "expert", "expert")
    files = [tmp_path / name for name in ("c.json", "c.md", "c.html")]
    said = command(random, expert, "--json", files[0], "--markdown", files[1], "--html", files[2])
    numbers = json.loads(files[0].read_text())
    (panel,) = numbers["panels"].values()
    rows = {row["label"]: row for row in panel["rows"]}
    assert list(rows) == ["success", "left", "right"]
    played = {name: next((tmp_path / name).rglob("*.parquet")) for name in ("random", "expert")}
    means = {name: task_means(read_episodes(file)) for name, file in played.items()}
    lost_by_random = [task for task, value in means["random"].items() if value == 0]
    found = rows["success"]["differences"][str(expert)]
    assert 0 < len(lost_by_random) < 8
    assert found["mean"] == pytest.approx(len(lost_by_random) / 8)
    assert (found["gained"], found["lost"], found["tasks"]) == (len(lost_by_random), 0, 8)
    assert found["p_value"] == pytest.approx(min(1.0, 2 / 2 ** len(lost_by_random)))
    assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    assert rows["left"]["differences"][str(expert)]["tasks"] == 4
    assert rows["left"]["task_type"] == "left"
    assert str(random) not in rows["success"]["differences"]
    assert f"{100 * found['mean']:+.1f} [" in said
    assert "McNemar's exact test" in said
    assert f"{expert} against {random}" in files[1].read_text()
    assert agentrl.compare(random, expert).to_dict() == numbers


def test_repeats_add_pass_at_k_and_several_policies_a_table_each(tmp_path: Path) -> None:
    options: dict[str, Any] = {"repeats": 4, "envs": (ENV, TWIN), "tasks": 4}
    base = scored(tmp_path / "base", **options)
    others = [scored(tmp_path / name, "expert", **options) for name in ("one", "two")]
    found = agentrl.compare(base, *others)
    assert [table.title for table in found.tables] == [f"{other} against {base}" for other in others]
    panels = found.to_dict()["panels"]
    assert list(panels) == [ENV, TWIN]
    labels = [row["label"] for row in panels[TWIN]["rows"]]
    assert labels == ["success", "pass@2", "pass@4", "left", "right"]
    stored = json.loads((base / "results.json").read_text())["policies"]["random"][TWIN]["evaluation"]
    assert panels[TWIN]["rows"][0]["scores"][str(base)]["interval"] == stored["interval"]
    assert panels[TWIN]["rows"][1]["scores"][str(base)] == stored["pass_at"]["2"]
    for row in panels[ENV]["rows"]:
        of_base, of_other = (row["scores"][str(each)] for each in (base, others[0]))
        means = [each.get("success_rate", each.get("mean")) for each in (of_base, of_other)]
        assert row["differences"][str(others[0])]["mean"] == pytest.approx(means[1] - means[0])
    assert [row[0] for row in found.tables[0].rows][:3] == [ENV, f"{ENV}, pass@2", f"{ENV}, pass@4"]
    assert any("sign test" in note for note in found.notes)


def test_the_policies_of_one_evaluation_are_compared(tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    evaluate_panels(["random", "expert"], envs=(ENV,), tasks=3, placement="inline", output=folder)
    assert f"{folder}: expert against {folder}: random" in command(folder)


def test_aborted_plays_are_in_no_pair(tmp_path: Path) -> None:
    random, expert = scored(tmp_path / "random"), scored(tmp_path / "expert", "expert")
    (file,) = expert.rglob("*.parquet")
    first, *others = read_episodes(file)
    write_episodes(file, [replace(first, stop=StopReason.ENV_ERROR, success=False), *others])
    found = agentrl.compare(random, expert)
    row = found.to_dict()["panels"][ENV]["rows"][0]
    assert row["differences"][str(expert)]["tasks"] == 7
    assert row["scores"][str(expert)]["episodes"] == 7
    assert f"{ENV}: 1 aborted episodes of {expert}" in found.notes
    assert f"{ENV}: 1 tasks are left out of the difference of {expert}" in found.notes


def test_a_panel_that_one_could_not_play_is_named(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(f"panels: [{{env: {ENV}, tasks: 2}}, {{env: no/Such-v0}}]")
    options: dict[str, Any] = {"envs": (), "tasks": None, "suite": tmp_path / "suite.yaml"}
    random, expert = scored(tmp_path / "random", **options), scored(tmp_path / "expert", "expert", **options)
    said = command(random, expert)
    assert f"not compared: no/Such-v0, not played by {random}: " in said
    assert f"{ENV}: 2 tasks" in said


# Pages.


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_in_light_and_dark(tmp_path: Path) -> None:
    random, expert = scored(tmp_path / "<b>random"), scored(tmp_path / "expert", "expert")
    text = agentrl.compare(random, expert).to_html()
    page = _Page(text)
    assert len(page.sources) == 1
    assert page.sources[0].startswith("data:image/svg+xml;base64,")
    assert "b" not in page.tags
    assert {"table", "img", "style"} <= page.tags
    assert "prefers-color-scheme: dark" in text
    assert "--paper" in text
    assert text == agentrl.compare(random, expert).to_html()


# Runs.


def test_runs_are_compared_as_they_were_evaluated(runs: Path) -> None:
    said = command("runs/A", "runs/B")
    assert "runs/B against runs/A" in said
    numbers = {
        decoding: agentrl.compare("runs/A", "runs/B", decoding=decoding).to_dict()
        for decoding in ("sampled", "greedy")
    }
    assert agentrl.compare("A", agentrl.open_run("runs/B")).to_dict()["decoding"] == "sampled"
    for decoding, found in numbers.items():
        (panel,) = found["panels"].values()
        assert (panel["tasks"], panel["repeats"], panel["env"]) == (6, 2, ENV)
        for name in ("A", "B"):
            summary = json.loads((runs / name / "summary.json").read_text())
            score = summary["policies"]["trained"][decoding]
            shown = panel["rows"][0]["scores"][f"runs/{name}"]
            assert shown == {key: score[key] for key in ("success_rate", "interval", "episodes")}


def test_a_run_is_compared_with_an_evaluation_on_its_panel(runs: Path) -> None:
    evaluate_panels(["runs/B"], repeats=2, temperature=0.0, output="again")
    found = agentrl.compare("runs/A", "again").to_dict()
    assert found["decoding"] == "greedy"
    stored = agentrl.compare("runs/A", "runs/B", decoding="greedy").to_dict()
    (one,), (other,) = found["panels"].values(), stored["panels"].values()
    assert one["rows"][0]["differences"]["again"] == other["rows"][0]["differences"]["runs/B"]
    assert "again: an evaluation that is greedy, wanted sampled" in refused("runs/A", "again", "--sampled")


# What is refused.


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"repeats": 2}, "repeats: 1 for "),
        ({"seed": 1}, "seed: 0 for "),
        ({"tasks": 7}, "panel: "),
        ({"split": "train"}, "panel: "),
    ],
)
def test_scores_that_were_measured_otherwise_are_refused(
    changed: Mapping[str, Any], difference: str, tmp_path: Path
) -> None:
    one, other = scored(tmp_path / "one"), scored(tmp_path / "other", "expert", **changed)
    said = refused(one, other)
    assert "cannot be compared, since they differ in" in said
    assert difference in said


@pytest.mark.parametrize(
    ("key", "before", "after", "said"),
    [
        ("data", '"data": "made up"', '"data": "other"', 'data: "made up" for runs/A, "other" for runs/B'),
        ("panel.hash", None, None, "panel: "),
    ],
)
def test_runs_on_other_data_or_panels_are_refused(
    key: str, before: str | None, after: str | None, said: str, runs: Path
) -> None:
    file = runs / "B" / "summary.json"
    tree = json.loads(file.read_text())
    if before is None:
        tree["panel"]["hash"] = "0" * 64
        file.write_text(json.dumps(tree))
    else:
        file.write_text(json.dumps(tree).replace(before, str(after)))
    assert said in refused("runs/A", "runs/B")


@pytest.mark.parametrize(
    ("key", "value", "said", "varying"),
    [
        ("path", "some-model", 'policy.path: null for runs/A, "some-model" for runs/B', "policy.model"),
        ("max_observation_tokens", 99, "policy.max_observation_tokens: ", "prompt.max_observation_tokens"),
    ],
)
def test_other_models_or_prompts_are_refused_unless_they_are_to_differ(
    key: str, value: Any, said: str, varying: str, runs: Path
) -> None:
    file = runs / "B" / "config.yaml"
    text, count = re.subn(rf"(?m)^  {key}: .*$", f"  {key}: {value}", file.read_text())
    assert count >= 1
    file.write_text(text)
    answer = refused("runs/A", "runs/B")
    assert said in answer
    assert f"if they are meant to: --varying {varying}\n" in answer
    assert f"meant to differ: {varying}: " in command("runs/A", "runs/B", "--varying", varying)


def test_the_prompt_of_a_run_is_that_which_it_recorded(runs: Path) -> None:
    file = runs / "B" / "manifest.json"
    tree = json.loads(file.read_text())
    tree["prompt"]["prompt"] = "{{ observation }} Think!"
    file.write_text(json.dumps(tree))
    assert "text of policy.prompt: null for runs/A" in refused("runs/A", "runs/B")


def test_bad_input_is_refused_in_one_line(runs: Path, tmp_path: Path) -> None:
    for words, said in (
        (("runs/A",), "runs/A holds one policy, wanted at least two"),
        (("runs/A", "runs/A"), "wanted each once"),
        (("runs/A", "runs/C"), "runs/C: no such folder, wanted a run, or a folder that"),
        (("runs/A", "runs"), "runs: holds neither"),
        (("runs/A", "runs/B/summary.json"), "summary.json: a file, wanted"),
        (("runs/A", "runs/B", "--varying", "seed"), "varying is 'seed', wanted one of agentrl, dtype, "),
        (("runs/A", "runs/B", "--varying", "data"), "varying is 'data', wanted one of"),
        (("runs/A", "runs/B", "--html", "gone/page.html"), "gone"),
    ):
        assert said in run(*words).stderr, words
        assert run(*words).exit_code == 2
    with pytest.raises(ConfigError, match="there are no folders"):
        agentrl.compare()
    with pytest.raises(ConfigError, match="decoding 'warm' is unknown"):
        agentrl.compare("runs/A", "runs/B", decoding="warm")


def test_what_is_unfinished_or_damaged_is_refused(runs: Path, tmp_path: Path) -> None:
    def stop(episode: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "begun", on_episode=stop)
    whole = scored(tmp_path / "whole")
    assert "begun: an unfinished evaluation; give the command" in refused(whole, tmp_path / "begun")
    other = scored(tmp_path / "other", envs=(TWIN,))
    assert f"{other} has none on {ENV}; {whole} has none on {TWIN}" in refused(whole, other)
    (file,) = whole.rglob("*.parquet")
    write_episodes(file, read_episodes(file)[1:])
    assert "holds 7 episodes of 7 tasks, wanted 1 of each of 8" in refused(
        whole, scored(tmp_path / "x", "expert")
    )
    file.unlink()
    assert "not a readable file of episodes" in refused(whole, tmp_path / "x")
    (whole / "results.json").write_text("{")
    assert "results.json: damaged" in refused(whole, tmp_path / "x")
    (runs / "B" / "summary.json").unlink()
    assert "runs/B: an unfinished run, without sampled scores" in refused("runs/A", "runs/B")


# The document.


DOCUMENTED = [
    line
    for block in blocks((ROOT / "docs" / "evaluation.md").read_text())
    for line in block
    if line.startswith("agentrl compare")
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_a_command_of_the_document_runs_as_it_is_written(line: str, runs: Path) -> None:
    for name, policy in (("base", "random"), ("trained", "expert")):
        scored(Path("scores") / name, policy)
    command(*line.split()[2:])
    written = re.findall(r"\S+\.(?:html|md|json)", line)
    assert all(Path(file).stat().st_size > 100 for file in written)


def test_the_document_shows_every_way_to_write_a_comparison() -> None:
    text = "\n".join(DOCUMENTED)
    assert all(option in text for option in ("--html", "--markdown", "--json", "--greedy", "--varying"))
