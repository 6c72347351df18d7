"""Checkpoints share files that do not change; any of them can be evaluated and exported."""

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from test_damaged_runs import TINY
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.errors import CheckpointError, ConfigError
from agentrl.evaluation.run_scores import RunScores
from agentrl.run.checkpoint import checkpoints
from agentrl.run.signals import RunInterrupted
from agentrl.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (*TINY, "evaluation.baselines=[]", "trainer.checkpoint_every=1")
KL = ("algorithm.kl_coefficient=0.1", "algorithm.drop_equal_groups=false")


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *SMALL, f"run.folder={folder}", "run.name=tiny", *more)


@pytest.fixture(scope="module")
def finished(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    """A run with a reference, all of whose checkpoints are kept."""
    folder = tmp_path_factory.mktemp("finished")
    return agentrl.train(config(folder, *KL, "trainer.keep_checkpoints=null"), quiet=True)


@pytest.fixture
def run(finished: agentrl.Run, tmp_path: Path) -> Path:
    """A copy of that run, as it was when step 2 was done."""
    copied = tmp_path / "tiny"
    shutil.copytree(finished.folder, copied)
    shutil.rmtree(copied / "model")
    shutil.rmtree(copied / "checkpoints" / "train-000003")
    (copied / "summary.json").unlink()
    return copied


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run / "checkpoints")]


def inodes(run: Path, file: str) -> set[int]:
    return {
        (path / file).stat().st_ino for path in checkpoints(run / "checkpoints") if (path / file).exists()
    }


def test_all_checkpoints_are_kept_if_asked_and_share_the_reference(finished: agentrl.Run) -> None:
    stages = [
        f"{stage}-{step:06d}"
        for stage, last in (("warm_start", 2), ("train", 3))
        for step in (1, 2, 3)[:last]
    ]
    assert names(finished.folder) == stages
    assert len(inodes(finished.folder, "reference.safetensors")) == 1
    assert len(inodes(finished.folder, "weights.safetensors")) == 5
    cloned = load_file(finished.folder / "checkpoints/warm_start-000002/weights.safetensors")
    reference = load_file(finished.folder / "checkpoints/train-000003/reference.safetensors")
    assert cloned.keys() == reference.keys()
    assert all(cloned[name].equal(reference[name]) for name in cloned)


def test_a_resumed_run_takes_up_the_reference_and_what_pruning_leaves_is_whole(
    finished: agentrl.Run, run: Path
) -> None:
    agentrl.resume(run, "trainer.keep_checkpoints=1", quiet=True)
    assert names(run)[-1] == "train-000003"
    assert len(names(run)) <= 2  # the newest, and the best
    one, other = (path / "model/model.safetensors" for path in (run, finished.folder))
    assert one.read_bytes() == other.read_bytes()
    again = load_file(run / "checkpoints/train-000003/reference.safetensors")
    first = load_file(finished.folder / "checkpoints/train-000001/reference.safetensors")
    assert all(again[name].equal(first[name]) for name in first)


def test_weights_that_no_step_changed_are_written_once(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    """A group of one episode is compared with nothing, so that nothing is learned."""
    idle = ("rollout.group_size=1", "trainer.keep_checkpoints=null")
    folder = agentrl.train(config(tmp_path, *idle), quiet=True).folder
    files = [
        path / "weights.safetensors" for path in checkpoints(folder / "checkpoints") if "train" in path.name
    ]
    assert len(files) == 3
    assert len({file.stat().st_ino for file in files}) == 1
    shutil.rmtree(files[0].parent)
    shutil.rmtree(files[1].parent)
    found = agentrl.evaluate(str(files[2].parent), tasks=2)
    assert found.checkpoint == "train-000003"


def test_without_hard_links_files_are_copied(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refusing)
    folder = agentrl.train(config(tmp_path, "rollout.group_size=1"), quiet=True).folder
    kept = [path for path in checkpoints(folder / "checkpoints") if "train" in path.name]
    assert len(inodes(folder, "weights.safetensors")) == len(checkpoints(folder / "checkpoints"))
    assert (
        kept[0].joinpath("weights.safetensors").read_bytes()
        == kept[1].joinpath("weights.safetensors").read_bytes()
    )


@pytest.mark.parametrize("warm", ["warm_start.steps=0", "warm_start.steps=2"])
def test_a_stop_during_baselines_writes_no_weights_that_are_there_already(
    warm: str, examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = RunScores.measure

    def stopping(self: RunScores, name: str, decoding: str) -> Any:
        if (name, decoding) == ("untrained", "sampled"):
            raise KeyboardInterrupt
        return measure(self, name, decoding)

    monkeypatch.setattr(RunScores, "measure", stopping)
    with pytest.raises(RunInterrupted, match="continue with: agentrl train --resume"):
        agentrl.train(config(tmp_path, warm, "evaluation.baselines=[untrained]"), quiet=True)
    assert names(tmp_path / "tiny") == []
    with pytest.raises(CheckpointError, match="has not finished and has no checkpoint yet"):
        agentrl.evaluate(str(tmp_path / "tiny"))
    monkeypatch.undo()
    finished = agentrl.resume(tmp_path / "tiny", quiet=True)
    assert set(finished.summary["policies"]) == {"untrained", "trained"}


def test_a_stop_before_the_first_training_step_resumes_from_the_clone(
    finished: agentrl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = TrainingState.start_training

    def stopping(self: TrainingState) -> None:
        start(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "start_training", stopping)
    with pytest.raises(RunInterrupted, match="stopped after train step 0"):
        agentrl.train(config(tmp_path, *KL), quiet=True)
    assert names(tmp_path / "tiny") == ["warm_start-000001", "warm_start-000002"]
    monkeypatch.undo()
    agentrl.resume(tmp_path / "tiny", quiet=True)
    one, other = (path / "model/model.safetensors" for path in (tmp_path / "tiny", finished.folder))
    assert one.read_bytes() == other.read_bytes()


def test_an_unfinished_run_is_evaluated_at_its_newest_checkpoint_and_says_so(
    finished: agentrl.Run, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = agentrl.evaluate(str(run), temperature=0.0)
    assert f"{run} has not finished: this is its newest checkpoint, train-000002" in caplog.text
    assert found.to_dict()["checkpoint"] == "train-000002"
    named = agentrl.evaluate(str(finished.folder / "checkpoints" / "train-000002"), temperature=0.0)
    assert named == found
    assert agentrl.evaluate(finished, temperature=0.0).checkpoint is None
    last = agentrl.evaluate(finished.folder / "checkpoints" / "train-000003", temperature=0.0)
    assert last.success == agentrl.evaluate(finished, temperature=0.0).success
    output = tmp_path / "scores.json"
    told = CliRunner().invoke(
        app, ["evaluate", "--policy", str(run), "--tasks", "2", "--output", str(output)]
    )
    assert "checkpoint: train-000002" in told.output
    assert json.loads(output.read_text())["checkpoint"] == "train-000002"
    watched = CliRunner().invoke(app, ["play", "example/HotCold-v0", "--policy", str(run)])
    assert watched.exit_code == 0, watched.output


def test_a_checkpoint_is_exported_as_the_run_that_ends_there_would_be(
    finished: agentrl.Run, run: Path, tmp_path: Path
) -> None:
    to = tmp_path / "out"
    told = CliRunner().invoke(app, ["export", str(finished.folder), "--checkpoint", "3", "--to", str(to)])
    assert told.exit_code == 0, told.output
    assert (to / "model.safetensors").read_bytes() == (finished.model / "model.safetensors").read_bytes()
    assert agentrl.evaluate(to, temperature=0.0, env="example/HotCold-v0", split="test", tasks=2).success
    CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "newest")])
    newest = load_file(tmp_path / "newest" / "model.safetensors")
    held = load_file(run / "checkpoints/train-000002/weights.safetensors")
    shared = newest.keys() & held.keys()  # each file names tied weights once, by one of their names
    assert len(shared) == len(newest) - 1
    assert all(newest[name].equal(held[name]) for name in shared)
    refused = CliRunner().invoke(app, ["export", str(run), "--to", str(to)])
    assert refused.exit_code == 2
    assert "exists; choose a new folder" in refused.output
    with pytest.raises(CheckpointError, match=r"there is no train-000009; the run has kept warm_start-0"):
        agentrl.evaluate(run / "checkpoints" / "train-000009")
    refused = CliRunner().invoke(app, ["export", str(run), "--checkpoint", "9", "--to", str(tmp_path / "x")])
    assert "there is no train-000009; the run has kept warm_start-000001" in refused.output


def test_a_checkpoint_that_is_damaged_or_of_a_newer_version_is_refused_by_name(run: Path) -> None:
    newest = run / "checkpoints" / "train-000002"
    progress, weights = newest / "progress.json", newest / "weights.safetensors"
    stored = json.loads(progress.read_text())
    progress.write_text(json.dumps(stored | {"format": 3}))
    for work in (agentrl.evaluate, agentrl.resume):
        with pytest.raises(CheckpointError, match=r"train-000002"):
            work(str(run))
    with pytest.raises(CheckpointError, match=r"newer agentrl \(format 3; this version reads up to 2\)"):
        agentrl.run.records.read_progress(newest)
    progress.write_text(json.dumps(stored))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"train-000002: .*weights\.safetensors.* changed after"):
        agentrl.evaluate(str(run))


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.keep_checkpoints"):
        config(tmp_path, "trainer.keep_checkpoints=0")
