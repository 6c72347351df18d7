"""A study from the outside: what it runs, what it runs again, and what its numbers mean."""

import importlib.util
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from agentrl.algorithms.recipe import recipe_class, recipe_names
from agentrl.cli import app
from agentrl.config import to_yaml
from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import Episode, StopReason, Turn
from agentrl.errors import ConfigError
from agentrl.evaluation.paired import interquartile_mean
from agentrl.evaluation.statistics import wilson
from agentrl.run.checkpoint import latest_checkpoint
from agentrl.run.logger import read_metrics
from agentrl.run.settings import RunConfig, config_tree
from agentrl.run.signals import RunInterrupted
from agentrl.study import processes, study
from agentrl.study.comparison import compare, downsample, spread_over_seeds, verdict
from agentrl.study.config import load_study
from agentrl.study.runs import StudyRun, plan
from agentrl.study.settings import differences
from agentrl.study.study import run_study
from agentrl.study.tables import write_comparison

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "env": {"id": "example/HotCold-v0"},
    "evaluation": {"split": "test", "tasks": 6},
    "warm_start": {"steps": 4, "demonstrations": 24},
    "trainer": {"steps": 4, "checkpoint_every": 3},
    "policy": {"tokenizer_episodes": 4},
    "rollout": {"groups_per_step": 4, "group_size": 4, "placement": "inline"},
}
STUDY: dict[str, Any] = {
    "base": "base.yaml",
    "seeds": [0, 1],
    "baseline": "grpo",
    "methods": {"grpo": {"algorithm": {"name": "grpo"}}, "still": {"trainer": {"steps": 0}}},
}


def written(folder: Path, **changes: Any) -> Path:
    """A study's file, beside the configuration that it is based on."""
    (folder / "base.yaml").write_text(to_yaml(BASE))
    (folder / "tiny.yaml").write_text(to_yaml(STUDY | changes))
    return folder / "tiny.yaml"


class Ended:
    """A process that has run."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode


def started_here(run: StudyRun, lock: int) -> Ended:
    """Run the command in this process, which has imported torch already."""
    result = CliRunner().invoke(app, run.arguments, prog_name="agentrl")
    run.log.write_text(result.output)
    return Ended(result.exit_code)


@pytest.fixture(scope="module")
def unbroken(
    examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start", started_here)
        return folder, run_study(load_study(written(folder)), folder / "study")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of the commands that a study starts."""
    commands: list[list[str]] = []

    def recording(run: StudyRun, lock: int) -> Ended:
        commands.append(run.arguments)
        return started_here(run, lock)

    monkeypatch.setattr(processes, "start", recording)
    return commands


def without_clock(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results, less what no two runs have in common."""
    tree: dict[str, Any] = json.loads(json.dumps(results))
    for found in tree["methods"].values():
        for run in found["runs"].values():
            del run["cpu_seconds"]
    return tree


def test_every_method_starts_from_the_clone_of_its_seed(unbroken: tuple[Path, dict[str, Any]]) -> None:
    folder, results = unbroken
    assert results["failed"] == {}
    for seed in ("seed-0", "seed-1"):
        runs = {name: folder / "study" / seed / name for name in ("clone", "grpo", "still")}
        weights = {name: (run / "model/model.safetensors").read_bytes() for name, run in runs.items()}
        assert weights["still"] == weights["clone"] != weights["grpo"]
        for decoding in ("greedy", "sampled"):
            path = f"episodes/trained-{decoding}.parquet"
            said = {
                name: [
                    (episode.task, turn.prompt_ids, turn.action_ids)
                    for episode in read_episodes(run / path)
                    for turn in episode.turns
                ]
                for name, run in runs.items()
            }
            assert said["still"] == said["clone"]
    one, two = (folder / "study" / seed / "clone/model/model.safetensors" for seed in ("seed-0", "seed-1"))
    assert one.read_bytes() != two.read_bytes()


def test_the_results_count_what_each_run_did(unbroken: tuple[Path, dict[str, Any]]) -> None:
    folder, results = unbroken
    assert list(results["methods"]) == ["clone", "grpo", "still"]
    for run in results["methods"]["grpo"]["runs"].values():
        assert run["episodes"] == 4 * 4 * 4
        assert run["replay_updates"] == 0
        assert run["curves"]["train/rollout/success_rate"]["step"] == [1, 2, 3, 4]
        assert len(run["curves"]["train/rollout/entropy/trajectory"]["value"]) == 4
        assert run["cpu_seconds"] > 0
    assert "runs differ in episodes: grpo 64, still 0" in results["warnings"]
    still = results["methods"]["still"]["sampled"]
    assert still["by_seed"] == results["methods"]["clone"]["sampled"]["by_seed"]
    assert json.loads((folder / "study/results.json").read_text()) == results
    table = (folder / "study/table.md").read_text()
    for text in (
        "| clone (start) |",
        "| grpo (baseline) |",
        "| still |",
        "int(0.25 * 2) = 0",
        "differ in episodes",
    ):
        assert text in table
    assert "<svg" in (folder / "study/study.svg").read_text()


def test_a_finished_study_runs_nothing_again(
    unbroken: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = unbroken
    commands = recorded(monkeypatch)
    assert run_study(load_study(folder / "tiny.yaml"), folder / "study") == results
    assert commands == []


def test_only_the_run_that_was_killed_goes_on(
    unbroken: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = unbroken
    shutil.copytree(folder / "study", tmp_path / "study")
    run = tmp_path / "study/seed-1/grpo"
    shutil.rmtree(run / "checkpoints/train-000004")
    for name in ("summary.json", "report.html", "evaluations.json"):
        (run / name).unlink()
    commands = recorded(monkeypatch)
    again = run_study(load_study(folder / "tiny.yaml"), tmp_path / "study")
    assert commands == [["train", "--resume", str(run)]]
    assert without_clock(again) == without_clock(results)


def test_a_method_that_fails_is_told_and_the_others_go_on(
    unbroken: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = unbroken
    shutil.copytree(folder / "study", tmp_path / "study")
    shutil.rmtree(tmp_path / "study/seed-0/still")
    rates = {"learning_rate": 1e15, "matrix_learning_rate": 1e15, "warmup_steps": 0}
    wild = {"learner": rates | {"clip_gradient": None}}
    methods = {"wild": wild, **STUDY["methods"]}
    monkeypatch.setattr(processes, "start", started_here)
    results = run_study(load_study(written(tmp_path, methods=methods, seeds=[0])), tmp_path / "study")
    assert list(results["failed"]) == ["seed-0/wild"]
    assert list(results["methods"]) == ["clone", "grpo", "still"]
    assert "no run of wild has finished" in results["warnings"]
    assert "failed: wild, seed 0: exit code 2: " in capsys.readouterr().out


def test_without_its_clone_a_method_does_not_start(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = recorded(monkeypatch)
    results = run_study(
        load_study(written(tmp_path), "evaluation.tasks=500", "seeds=[3]"), tmp_path / "study"
    )
    assert [command[1].rpartition("/")[2] for command in commands] == ["clone.yaml"]
    assert "500" in results["failed"]["seed-3/clone"]
    assert results["failed"]["seed-3/grpo"] == results["failed"]["seed-3/still"] == "its clone failed"
    assert results["methods"] == {}
    assert "seed-3/clone" in (tmp_path / "study/table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"methodz": {}}, (), "methodz: unknown key (got {}; did you mean methods?)"),
        ({"baseline": "grop"}, (), "baseline: not a method (got 'grop'; did you mean grpo?)"),
        ({"seeds": [1, 1]}, (), "seeds: wanted at least one, without duplicates (got 1, 1)"),
        ({"base": "bases.yaml"}, (), "bases.yaml: no such config file"),
        ({"overrides": ["seed=3"]}, (), "overrides: 'seed=3' is set by the study itself"),
        ({}, ("trainer.stepz=3",), "trainer.stepz: unknown key"),
        ({}, ("methods.clone={}",), "methods.clone: wanted a name"),
        ({}, ("methods.a={algorithm: {name: gpo}}",), "methods.a: algorithm.name: unknown recipe (got 'gpo'"),
        (
            {},
            ("methods.a={evaluation: {tasks: 3}}",),
            "methods.a: evaluation.tasks: must be the same for all",
        ),
        (
            {},
            ("methods.a={rollout: {max_turns: 3}}",),
            "methods.a: rollout.max_turns: must be the same for all",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_starts(
    changes: dict[str, Any],
    overrides: Sequence[str],
    message: str,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = recorded(monkeypatch)
    with pytest.raises(ConfigError) as error:
        run_study(load_study(written(tmp_path, **changes), *overrides), tmp_path / "study")
    assert message in str(error.value)
    assert commands == []
    assert not (tmp_path / "study").exists()


def test_every_method_with_a_mistake_is_named(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    bad = {"a": {"algorithm": {"clip": 1}}, "b": {"seed": 4}, **STUDY["methods"]}
    with pytest.raises(ConfigError) as error:
        plan(load_study(written(tmp_path, methods=bad)), tmp_path)
    lines = str(error.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["methods.a", "methods.b"]


def test_a_run_that_was_made_with_other_values_is_not_taken_for_this_one(
    unbroken: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = unbroken
    changed = load_study(folder / "tiny.yaml", "learner.learning_rate=0.5", "methods.new={}")
    with pytest.raises(ConfigError) as error:
        run_study(changed, folder / "study")
    told = str(error.value).splitlines()
    assert len(told) == 7  # six runs, and what to do
    assert told[1].endswith("seed-0/grpo was created with other values of learner.learning_rate")
    assert not (folder / "study/seed-0/new.yaml").exists()


def test_a_folder_belongs_to_one_study_at_a_time(
    unbroken: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = unbroken
    with study._exclusive(folder / "study"), pytest.raises(ConfigError, match="in use by a study"):
        run_study(load_study(folder / "tiny.yaml"), folder / "study")


def test_a_block_of_another_recipe_replaces_the_whole_block(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    methods = {
        "narrow": {"algorithm": {"clip_low": 0.1}},
        "other": {"algorithm": {"name": "dr_grpo", "clip_low": 0.3}},
    }
    path = written(tmp_path, methods=methods, baseline="narrow", overrides=["algorithm.clip_high=0.4"])
    _, narrow, other = (run.config.algorithm for run in plan(load_study(path, "seeds=[0]"), tmp_path))
    assert (narrow.name, narrow.clip_low, narrow.clip_high) == ("grpo", 0.1, 0.4)
    assert (other.name, other.clip_low, other.clip_high) == ("dr_grpo", 0.3, 0.2)


def test_a_block_with_a_preset_replaces_the_whole_block_since_nothing_is_open_in_the_bases(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    methods = {
        "plain": {"algorithm": {"name": "grpo"}},
        "paper": {"algorithm": {"preset": "paper", "clip_low": 0.1}},
        "same": {"algorithm": {"preset": "ours", "clip_low": 0.1}},
    }
    path = written(tmp_path, methods=methods, baseline="plain", overrides=["algorithm.clip_high=0.4"])
    _, _, paper, same = (run.config.algorithm for run in plan(load_study(path, "seeds=[0]"), tmp_path))
    assert (paper.name, paper.preset, paper.kl_coefficient) == ("grpo", "paper", 0.04)
    assert (paper.clip_low, paper.clip_high) == (0.1, 0.2)
    assert (same.kl_coefficient, same.clip_low, same.clip_high) == (0.0, 0.1, 0.4)


def episodes_a_step(config: RunConfig) -> int:
    rollout = config.rollout
    return rollout.groups_per_step * (config.algorithm.build().rollout.episodes or rollout.group_size)


@pytest.mark.filterwarnings("ignore:epo:UserWarning")
def test_every_setting_of_the_shipped_study_plays_as_many_episodes(tmp_path: Path) -> None:
    shipped = study.Study(load_study(ROOT / "configs/studies/quickstart_methods.yaml"), tmp_path)
    played = {one.name: episodes_a_step(one.config) for found in shipped.settings.values() for one in found}
    assert set(played.values()) == {64}, played
    assert all(len(found) == 3 for found in shipped.settings.values())


def test_every_method_is_in_the_shipped_study_or_said_to_be_left_out() -> None:
    file = ROOT / "configs/studies/quickstart_methods.yaml"
    _, _, rest = file.read_text().partition("Left out are methods that need")
    left_out = {
        name
        for line in rest.partition("methods:")[0].splitlines()[1:]
        for name in re.findall(r"\w+", line.rpartition(":")[2])
    }
    built_in = {name for name in recipe_names() if recipe_class(name).__module__.startswith("agentrl.")}
    assert built_in == left_out | set(load_study(file).methods)


def test_the_study_of_parts_changes_one_thing_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "configs/studies/below_grpo"
    monkeypatch.syspath_prepend(folder)
    runs = {run.name: run for run in plan(load_study(folder / "study.yaml", "seeds=[10]"), tmp_path)}
    fewer = {name for name, run in runs.items() if episodes_a_step(run.config) != 64}
    assert fewer == {"grpo-half_the_episodes"}

    def changed(one: str, other: str) -> list[str]:
        return differences(*(config_tree(runs[name].config) for name in (one, other)))

    assert changed("fr3e", "fr3e-mean_over_sequences")[:1] == ["algorithm.name"]
    assert changed("aepo", "aepo-without_branches") == ["algorithm.branch", "run.name"]
    assert changed("grpo", "grpo-mean_over_tokens") == ["algorithm.aggregation", "run.name"]


def test_an_interrupt_stops_every_process_and_keeps_what_they_did(
    unbroken: tuple[Path, dict[str, Any]],
    examples: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = unbroken
    shutil.copytree(folder / "study/seed-0", tmp_path / "study/seed-0")
    plugin = tmp_path / "plugin"
    (plugin / "hotcold-1.dist-info").mkdir(parents=True)
    shutil.copy(str(examples["hotcold"].__file__), plugin / "hotcold.py")
    (plugin / "hotcold-1.dist-info/METADATA").write_text("Name: hotcold\nVersion: 1\n")
    (plugin / "hotcold-1.dist-info/entry_points.txt").write_text("[agentrl.envs]\nhot = hotcold:plug_in\n")
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    runs = [tmp_path / "study/seed-0" / name for name in ("one", "two")]

    def interrupt_when_both_train() -> None:
        while not all(read_metrics(run / "metrics.jsonl") for run in runs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    methods = {"one": {"trainer": {"steps": 5000}}, "two": {"trainer": {"steps": 5000}}}
    path = written(tmp_path, methods=methods, baseline="one", seeds=[0])
    before = psutil.Process().children()  # other tests' own
    threading.Thread(target=interrupt_when_both_train, daemon=True).start()
    with pytest.raises(RunInterrupted, match="stopped with 1 of 3 runs finished; the same command continues"):
        run_study(load_study(path), tmp_path / "study", jobs=2)
    assert set(psutil.Process().children()) <= set(before)
    for run in runs:
        saved = latest_checkpoint(run / "checkpoints")
        assert saved is not None
        assert saved.name == f"train-{len(read_metrics(run / 'metrics.jsonl')):06d}"
    waiting = [run.arguments for run in plan(load_study(path), tmp_path / "study")[1:]]
    assert waiting == [["train", "--resume", str(run)] for run in runs]


# Tuning.

KNOB = {"key": "learner.learning_rate", "values": [1e-3, 1e-4]}
TUNED: dict[str, Any] = STUDY | {
    "seeds": [0],
    "tuning_seeds": [7, 8],
    "methods": {"grpo": {"algorithm": {"name": "grpo"}, "knob": KNOB}, "still": {"trainer": {"steps": 0}}},
}


def scored_here(rates: Mapping[str, float]) -> Callable[[StudyRun, int], Ended]:
    """Pretend to run a run: `made_up` with a success rate, by `seed/name` or else by name."""

    def start(run: StudyRun, lock: int) -> Ended:
        rate = rates.get(f"{run.config.seed}/{run.name}", rates.get(run.name, 0.5))
        won = round(10 * rate)
        if not run.folder.exists():
            made_up(run.folder, "1" * won + "0" * (10 - won))
        return Ended(0)

    return start


def names(folder: Path) -> list[str]:
    """The runs in a study's folder, as `seed/name`."""
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob("seed-*/*/summary.json"))


def test_the_knob_is_turned_on_the_tuning_seeds_and_the_best_value_is_compared(
    examples: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = "grpo-learning_rate-0_0001"
    # On the seed of the comparison the slow rate is the worse one: that must not matter.
    monkeypatch.setattr(processes, "start", scored_here({"grpo": 0.5, slow: 0.6, f"0/{slow}": 0.1}))
    found = run_study(load_study(written(tmp_path, **TUNED)), tmp_path / "study")
    tuned = [f"seed-{seed}/{name}" for seed in (7, 8) for name in ("clone", "grpo", slow)]
    assert names(tmp_path / "study") == sorted(
        [*tuned, *(f"seed-0/{n}" for n in ("clone", "grpo", slow, "still"))]
    )
    assert found["tuning"]["grpo"]["chosen"] == slow
    assert found["tuning"]["grpo"]["scores"] == {"grpo": {"7": 0.5, "8": 0.5}, slow: {"7": 0.6, "8": 0.6}}
    assert found["methods"][slow]["sampled"]["difference"]["value"] == pytest.approx(-0.4)
    assert found["missing"] == {"tuning": {}, "comparison": {}}
    sentence = "grpo: chosen: learning_rate 0.0001 (learning_rate 0.001 (own): 50.0/50.0, mean 50.0 %; "
    assert sentence in capsys.readouterr().out
    table = (tmp_path / "study/table.md").read_text()
    assert sentence in table
    assert "| grpo, learning_rate 0.0001, chosen |" in table
    assert "| grpo (baseline), learning_rate 0.001, own |" in table


def test_a_method_whose_own_value_is_best_or_as_good_runs_once(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "grpo-learning_rate-0_0001"
    monkeypatch.setattr(
        processes, "start", scored_here({"7/grpo": 0.3, "8/grpo": 0.6, f"7/{slow}": 0.6, f"8/{slow}": 0.3})
    )
    found = run_study(load_study(written(tmp_path, **TUNED)), tmp_path / "study")
    assert found["tuning"]["grpo"]["chosen"] == "grpo"
    assert not (tmp_path / "study/seed-0" / slow).exists()
    assert (
        "| grpo (baseline), learning_rate 0.001, own, chosen |" in (tmp_path / "study/table.md").read_text()
    )


def test_nothing_is_chosen_while_a_run_of_the_tuning_is_missing(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "grpo-learning_rate-0_0001"
    pretend = scored_here({slow: 0.9})

    def failing(run: StudyRun, lock: int) -> Ended:
        run.log.write_text("error: no")
        return Ended(2) if run.folder.parts[-2:] == ("seed-8", slow) else pretend(run, lock)

    monkeypatch.setattr(processes, "start", failing)
    failed = run_study(load_study(written(tmp_path, **TUNED)), tmp_path / "study")["failed"]
    assert list(failed) == [f"seed-8/{slow}"]
    assert names(tmp_path / "study")[:3] == ["seed-0/clone", "seed-0/grpo", "seed-0/still"]
    shutil.rmtree(tmp_path / "study/seed-0")
    found = run_study(load_study(tmp_path / "tiny.yaml"), tmp_path / "study", jobs=0)
    assert found["tuning"]["grpo"]["chosen"] is None
    assert found["missing"] == {
        "tuning": {slow: [8]},
        "comparison": {"clone": [0], "grpo": [0], "still": [0]},
    }
    table = (tmp_path / "study/table.md").read_text()
    assert f"- {slow}: tuning not finished on 8" in table
    assert "- no run of grpo, still has finished" in table
    assert "grpo: not chosen yet" in table


def test_only_the_named_methods_run_and_the_rest_is_said_to_be_missing(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "start", scored_here({}))
    study_of_two = load_study(written(tmp_path, **TUNED))
    found = run_study(study_of_two, tmp_path / "study", only=["still"])
    assert names(tmp_path / "study") == ["seed-0/clone", "seed-0/still"]
    assert found["methods"]["still"]["sampled"]["difference"] is None
    assert found["missing"]["comparison"] == {"grpo": [0]}
    assert found["missing"]["tuning"]["grpo"] == [7, 8]
    table = (tmp_path / "study/table.md").read_text()
    assert "- not tuned yet: grpo" in table
    assert "tuning not finished" not in table
    with pytest.raises(ConfigError, match=r"only: not a method .*did you mean still"):
        run_study(study_of_two, tmp_path / "study", only=["stil"])


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"key": "algorithm.clip_hihg", "values": [0.2, 0.3]}, "algorithm.clip_hihg: unknown key"),
        (
            {"key": "algorithm.clip_high", "values": [0.3, 0.4]},
            "knob.values: wanted at least two, exactly one",
        ),
        ({"key": "algorithm.clip_high", "values": [0.2]}, "knob.values: wanted at least two, exactly one"),
        (
            {"key": "algorithm.clip_high", "values": [0.2, 0.2, 0.3]},
            "exactly one of which is the method's own",
        ),
        ({"key": "algorithm.clip_high", "values": [0.2, 0.3, 0.3]}, "two settings are named a-clip_high-0_3"),
        ({"key": "evaluation.tasks", "values": [6, 7]}, "evaluation.tasks: must be the same for all"),
        ({"key": "algorithm.clip_high"}, "knob.values: is missing"),
        (3, "knob: wanted a block with `key` and `values`"),
    ],
)
def test_a_knob_with_a_mistake_is_found_before_anything_starts(
    knob: Any,
    message: str,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = recorded(monkeypatch)
    methods = {"a": {"algorithm": {"name": "grpo"}, "knob": knob}, **STUDY["methods"]}
    path = written(tmp_path, **(TUNED | {"methods": methods}))
    with pytest.raises(ConfigError) as error:
        run_study(load_study(path), tmp_path / "study")
    assert message in str(error.value)
    assert commands == []


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "tuning_seeds: wanted at least one, since grpo has a knob"),
        ([0, 1], "tuning_seeds: wanted none that is in seeds, without duplicates (got 0, 1)"),
        ([7, 7], "tuning_seeds: wanted none that is in seeds, without duplicates (got 7, 7)"),
    ],
)
def test_the_tuning_seeds_are_others(seeds: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_study(written(tmp_path, **(TUNED | {"tuning_seeds": seeds})))
    assert message in str(error.value)


def test_a_knob_of_several_keys_is_laid_over_the_block(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    knob = {"key": "algorithm", "values": [{"clip_low": 0.2}, {"clip_low": 0.1, "clip_high": 0.4}]}
    methods = {"grpo": {"algorithm": {"name": "grpo", "kl_coefficient": 0.5}, "knob": knob}}
    config = load_study(written(tmp_path, **(TUNED | {"methods": methods})))
    own, other = study.Study(config, tmp_path).settings["grpo"]
    assert (own.name, own.label, own.default) == ("grpo", "clip_low 0.2", True)
    assert (other.name, other.default) == ("grpo-clip_low-0_1-clip_high-0_4", False)
    changed: Any = other.config.algorithm
    assert (changed.clip_low, changed.clip_high, changed.kl_coefficient) == (0.1, 0.4, 0.5)


# What the numbers mean.


def test_a_difference_counts_if_both_intervals_lie_on_one_side() -> None:
    def said(interval: tuple[float, float], over_seeds: tuple[float, float]) -> str | None:
        return verdict({"interval": interval, "over_seeds": {"interval": over_seeds}})

    assert said((0.01, 0.2), (0.02, 0.3)) == "higher"
    assert said((-0.2, -0.01), (-0.3, -0.02)) == "lower"
    assert said((0.01, 0.2), (-0.02, 0.3)) == said((-0.01, 0.2), (0.02, 0.3)) == "alike"
    assert said((0.01, 0.2), (-0.3, -0.02)) == "alike"
    assert verdict(None) is None
    assert verdict({"interval": (0.1, 0.2), "over_seeds": None}) is None


def test_the_interval_over_seeds_is_students() -> None:
    found = spread_over_seeds([0.0, 0.1, 0.2])
    assert found is not None
    half = 4.302653 * 0.1 / 3**0.5  # t(0.975, 2) * sd / sqrt(3)
    assert (found["mean"], found["sd"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found["interval"] == pytest.approx([0.1 - half, 0.1 + half], rel=1e-6)
    assert spread_over_seeds([0.1]) is None


def test_what_cannot_be_told_from_the_baseline_comes_first(tmp_path: Path) -> None:
    plays = {"base": "1111100000", "better": "1111111100", "worse": "1100000000", "same": "1111000001"}
    folders = {
        seed: {name: made_up(tmp_path / f"{seed}{name}", 4 * play) for name, play in plays.items()}
        for seed in (0, 1)
    }
    results = compare(folders, list(plays), "base", "clone") | {"failed": {}}
    assert (results["alike"], results["lower"], results["higher"]) == (["same"], ["worse"], ["better"])
    write_comparison(tmp_path, results, Console(file=StringIO()))
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(
        "Cannot be told from base in sampled success: same. Lower than base: worse. Higher"
    )
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:6] == ["| base (baseline)", "| same", "| worse", "| better"]


def test_with_four_seeds_the_lowest_and_the_highest_are_left_out() -> None:
    rates = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=float)
    assert interquartile_mean(rates)[0] == (0.25 + 0.5) / 2
    assert interquartile_mean(rates[1:])[0] == (0.25 + 0.5 + 1) / 3  # of three, none is


def test_a_resample_is_one_draw_of_tasks_for_all_seeds() -> None:
    # Whatever is drawn of two tasks, what one seed gains the other loses.
    assert interquartile_mean(np.array([[1.0, 0.0], [0.0, 1.0]])) == (0.5, (0.5, 0.5))
    # Both seeds win the first task alone: a draw that holds it twice, or not at all, has one chance in four.
    assert interquartile_mean(np.array([[1.0, 0.0], [1.0, 0.0]])) == (0.5, (0.0, 1.0))


def test_the_interval_is_that_of_the_binomial_where_it_is_known() -> None:
    # 100 tasks, 50 of them won: the resampled rate is Binomial(100, 1/2) / 100, with quantiles .40 and .60.
    value, interval = interquartile_mean(np.array([[1.0] * 50 + [0.0] * 50]))
    assert value == 0.5
    assert interval == pytest.approx((0.40, 0.60), abs=0.011)


def test_what_is_not_known_is_in_no_mean() -> None:
    nothing = float("nan")
    value, _ = interquartile_mean(np.array([[1.0, nothing, 0.0, 0.0], [nothing] * 4]))
    assert value == 1 / 3
    assert interquartile_mean(np.array([[nothing, nothing]])) is None


def test_a_downsampled_curve_has_means_over_as_many_steps() -> None:
    rows = [{"step": step, "success": step / 4} for step in (1, 2, 3, 4, 5)] + [{"step": 6}]
    assert downsample(rows, "success", points=3) == {"step": [1.5, 3.5, 5], "value": [0.375, 0.875, 1.25]}
    assert downsample(rows, "entropy", points=3) == {"step": [], "value": []}


def made_up(folder: Path, plays: str, *, panel: str = "p", steps: Sequence[Mapping[str, Any]] = ()) -> Path:
    """A finished run whose policy won (1), lost (0) or aborted (-) the panel's tasks, in either decoding."""
    stops = {"1": StopReason.TERMINATED, "0": StopReason.TRUNCATED, "-": StopReason.ENV_ERROR}
    episodes = [
        Episode(f"e{index}", "x", f"task-{index}", 0, (Turn("o", "a"),), stops[play], play == "1")
        for index, play in enumerate(plays)
    ]
    (folder / "episodes").mkdir(parents=True)
    for decoding in ("greedy", "sampled"):
        write_episodes(folder / f"episodes/trained-{decoding}.parquet", episodes)
    score = {
        "success_rate": plays.count("1") / max(1, len(plays.replace("-", ""))),
        "interval": [0.0, 1.0],
        "episodes": len(plays),
        "by_task_type": {},
        "aborted": plays.count("-"),
    }
    summary = {
        "panel": {"hash": panel, "split": "test", "tasks": len(plays), "repeats": 1},
        "policies": {"trained": {"greedy": score, "sampled": score}},
        "times": {"rollout.cpu": 2.0, "learning.cpu": 3.5, "evaluation.cpu": 100.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(to_yaml(config_tree(RunConfig())))
    rows = [{"stage": "train", "step": index + 1} | dict(row) for index, row in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_differences_are_paired_over_seeds_and_tasks(tmp_path: Path) -> None:
    folders = {
        0: {"base": made_up(tmp_path / "0b", "1100"), "new": made_up(tmp_path / "0n", "1110")},
        1: {"base": made_up(tmp_path / "1b", "0000"), "new": made_up(tmp_path / "1n", "1-00")},
    }
    found = compare(folders, ["base", "new"], "base", "clone")["methods"]
    assert found["base"]["greedy"]["value"] == (0.5 + 0) / 2
    assert found["new"]["greedy"]["by_seed"] == {"0": 0.75, "1": 1 / 3}
    difference = found["new"]["greedy"]["difference"]
    assert difference["by_seed"] == {"0": 0.25, "1": 1 / 3}  # the aborted task is in neither
    assert difference["value"] == (0.25 + 1 / 3) / 2
    assert difference["interval"][0] == 0
    assert "difference" not in found["base"]["greedy"]


def test_plays_that_all_end_alike_have_wilsons_interval_over_the_tasks(tmp_path: Path) -> None:
    folders = {seed: {"base": made_up(tmp_path / str(seed), "0" * 20)} for seed in (0, 1, 2)}
    found = compare(folders, ["base"], "base", "clone")["methods"]["base"]["sampled"]
    assert (found["value"], tuple(found["interval"])) == (0.0, wilson(0, 20))


def test_updates_on_replayed_episodes_are_counted_apart(tmp_path: Path) -> None:
    steps = [
        {
            "train/rollout/episodes": 64.0,
            "train/rollout/aborted_rate": 0.25,
            "train/learner/updates": 1.0,
            "train/learner/skipped_updates": 0.0,
        },
        {
            "train/rollout/episodes": 64.0,
            "train/rollout/aborted_rate": 0.0,
        },  # nothing was kept, nothing learned
        {
            "train/rollout/episodes": 64.0,
            "train/rollout/aborted_rate": 0.0,
            "train/learner/updates": 4.0,
            "train/learner/skipped_updates": 0.0,
        },
        {
            "train/rollout/episodes": 64.0,
            "train/rollout/aborted_rate": 0.0,
            "train/learner/updates": 0.0,
            "train/learner/skipped_updates": 1.0,
        },
    ]
    folders = {0: {"a": made_up(tmp_path / "a", "10", steps=steps), "b": made_up(tmp_path / "b", "10")}}
    results = compare(folders, ["a", "b"], "a", "clone")
    run = results["methods"]["a"]["runs"]["0"]
    assert (run["episodes"], run["updates"], run["replay_updates"]) == (256, 2, 3)
    assert run["aborted"] == {"training": 16, "greedy": 0, "sampled": 0}
    assert run["cpu_seconds"] == 5.5
    assert results["warnings"] == ["runs differ in episodes: a 256, b 0", "runs differ in updates: a 2, b 0"]


def test_runs_of_two_panels_are_not_compared(tmp_path: Path) -> None:
    folders = {0: {"a": made_up(tmp_path / "a", "10"), "b": made_up(tmp_path / "b", "10", panel="q")}}
    with pytest.raises(ConfigError, match=r"seed-0/a was evaluated on panel .*'p'.* seed-0/b on .*'q'"):
        compare(folders, ["a", "b"], "a", "clone")


def test_the_script_ends_with_a_message_and_a_code(
    unbroken: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = unbroken
    spec = importlib.util.spec_from_file_location("study_script", ROOT / "scripts/study.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def code(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["study.py", *arguments])
        found: Callable[[], int] = script.main
        return found()

    given = [str(folder / "tiny.yaml"), "--folder", str(folder / "study")]
    assert code(*given, "seeds=[0]") == 0
    assert code(*given, "--jobs", "-1") == 2
    assert code(str(tmp_path / "none.yaml")) == 2
    assert code(*given, "sedes=[0]") == 2
    errors = capsys.readouterr().err
    for text in (
        "jobs is -1",
        "none.yaml: cannot be read",
        "sedes: unknown key (got [0]; did you mean seed?)",
    ):
        assert text in errors
