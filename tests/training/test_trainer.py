"""A run from the outside: what it leaves in its folder, and that stopping it anywhere changes nothing."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import agentrl
import agentrl.env
from agentrl.cli import app
from agentrl.errors import AgentRLError, CheckpointError, ConfigError, TooManyAbortedError
from agentrl.evaluation.scores import Evaluation
from agentrl.rollout.players import LanguagePlayer, RandomPlayer
from agentrl.run.logger import RunLogger
from agentrl.run.metric_keys import find_metric
from agentrl.run.resumption import with_overrides
from agentrl.run.signals import RunInterrupted
from agentrl.run.tasks import TaskOrder
from agentrl.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=5",
    "warm_start.steps=4",
    "warm_start.demonstrations=24",
    "trainer.steps=4",
    "trainer.checkpoint_every=3",
    "trainer.save_episodes_every=2",
    "policy.tokenizer_episodes=4",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.placement=inline",
)


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *TINY, f"run.folder={folder}", "run.name=tiny", *more)


@pytest.fixture(scope="module")
def unbroken(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    return agentrl.train(config(tmp_path_factory.mktemp("unbroken")), quiet=True)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_results(one: Path, other: Path) -> None:
    """Weights, metrics and evaluations, bit for bit, and the same episodes and checkpoints."""
    for folder in ("episodes", "checkpoints"):
        names = [sorted(path.name for path in (run / folder).iterdir()) for run in (one, other)]
        assert names[0] == names[1]
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    assert rows(one) == rows(other)
    assert (one / "evaluations.json").read_text() == (other / "evaluations.json").read_text()


def test_a_run_leaves_everything_in_its_folder(unbroken: agentrl.Run) -> None:
    names = {path.name for path in unbroken.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "summary.json",
        "manifest.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "episodes",
    }
    assert {path.name for path in (unbroken.folder / "checkpoints").iterdir()} >= {
        "train-000003",
        "train-000004",
    }
    assert [(row["stage"], row["step"]) for row in rows(unbroken.folder)] == [
        (stage, step) for stage in ("warm_start", "train") for step in (1, 2, 3, 4)
    ]
    summary = unbroken.summary
    assert set(summary["policies"]) == {"random", "expert", "untrained", "cloned", "trained"}
    assert summary["policies"]["expert"]["greedy"]["success_rate"] == 1.0
    assert summary["episodes_evaluated"] == 5
    assert not [path for path in unbroken.folder.rglob("*") if ".partial" in path.name]


def test_entropy_is_logged_at_every_level_and_stays_below_the_number_of_choices(
    unbroken: agentrl.Run,
) -> None:
    for row in rows(unbroken.folder)[4:]:
        for level in ("token", "turn", "trajectory"):
            # 15 numbers are admissible, and a choice of several tokens is drawn token by token.
            assert 0 < row[f"train/rollout/entropy/{level}"] < 2.71


def test_every_metric_that_a_run_writes_is_in_the_documented_table(unbroken: agentrl.Run) -> None:
    written = rows(unbroken.folder)
    assert {row["stage"] for row in written} == {"warm_start", "train"}
    for row in written:
        keys = row.keys() - {"stage", "step"}
        assert {
            key for key in keys if not key.startswith(f"{row['stage']}/") or not find_metric(key)
        } == set()


def test_the_learner_agrees_with_the_rollout_about_what_was_sampled(unbroken: agentrl.Run) -> None:
    assert max(row["train/algorithm/mismatch/max"] for row in rows(unbroken.folder)[4:]) < 1e-5


def interrupt_at(stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RunLogger.write

    def interrupting(self: RunLogger, row: dict[str, Any], **kwargs: Any) -> None:
        write(self, row, **kwargs)
        if (row["stage"], row["step"]) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLogger, "write", interrupting)


def interrupt_rollout(stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, seen = LanguagePlayer.submit, []

    def interrupting(self: LanguagePlayer, request: Any) -> None:
        submit(self, request)
        if request.episode_id.startswith(f"{stage}-{step - 1}-"):
            seen.append(request)
            if len(seen) == 7:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LanguagePlayer, "submit", interrupting)


def interrupt_tokenizer(stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = RandomPlayer.reply

    def interrupting(self: RandomPlayer, request: Any) -> Any:
        if request.episode_id == f"tokenizer-{step}":
            os.kill(os.getpid(), signal.SIGTERM)
        return reply(self, request)

    monkeypatch.setattr(RandomPlayer, "reply", interrupting)


def interrupt_learner(stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_learner = TrainingState.make_learner

    def interrupting(self: TrainingState, model: Any) -> Any:
        if (self.stage, self.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)
        return make_learner(self, model)

    monkeypatch.setattr(TrainingState, "make_learner", interrupting)


@pytest.mark.parametrize(
    ("interrupt", "stage", "step"),
    [
        (interrupt_tokenizer, "start", 2),
        (interrupt_at, "warm_start", 2),
        pytest.param(interrupt_learner, "train", 0, marks=pytest.mark.slow),
        (interrupt_at, "train", 2),
        (interrupt_rollout, "train", 3),
        (interrupt_rollout, "train", 1),
        (interrupt_rollout, "evaluation", 1),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    interrupt: Callable[..., None],
    stage: str,
    step: int,
    unbroken: agentrl.Run,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(stage, step, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as stopped:
        agentrl.train(config(tmp_path), quiet=True)
    if stage != "start":
        assert isinstance(stopped.value, RunInterrupted)
        assert f"agentrl train --resume {tmp_path / 'tiny'}" in str(stopped.value)
    monkeypatch.undo()
    agentrl.resume(tmp_path / "tiny", quiet=True)
    same_results(unbroken.folder, tmp_path / "tiny")


def test_a_run_is_resumed_by_a_process_that_has_seen_nothing_of_it(
    unbroken: agentrl.Run, examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_rollout("train", 3, monkeypatch)
    with pytest.raises(RunInterrupted):
        agentrl.train(config(tmp_path), quiet=True)
    command = [sys.executable, "-m", "agentrl", "train", "--resume", str(tmp_path / "tiny")]
    subprocess.run([*command, "--import", str(examples["hotcold"].__file__)], check=True, timeout=120)
    same_results(unbroken.folder, tmp_path / "tiny")


def test_a_stop_between_a_checkpoint_and_its_evaluation_loses_none(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = TrainingState.save_when_due

    def stopping(self: TrainingState) -> None:
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save_when_due", stopping)
    short = ("warm_start.steps=0", "evaluation.every=2", "evaluation.baselines=[]", "trainer.steps=3")
    with pytest.raises(RunInterrupted):
        agentrl.train(config(tmp_path, *short, "trainer.checkpoint_every=2"), quiet=True)
    assert not (tmp_path / "tiny" / "evaluations.json").exists()
    monkeypatch.undo()
    run = agentrl.resume(tmp_path / "tiny", quiet=True)
    assert set(run.summary["policies"]) == {"step-000002", "trained"}


def test_a_killed_run_goes_on_from_its_last_checkpoint(unbroken: agentrl.Run, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(unbroken.folder, run)
    shutil.rmtree(run / "checkpoints" / "train-000004")
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    evaluations = json.loads((run / "evaluations.json").read_text())
    del evaluations["trained"]
    (run / "evaluations.json").write_text(json.dumps(evaluations))
    (run / "checkpoints" / "train-000005.partial").mkdir()
    agentrl.resume(run, quiet=True)
    same_results(unbroken.folder, run)


def test_resuming_with_a_key_that_matters_is_refused_and_lists_it(unbroken: agentrl.Run) -> None:
    with pytest.raises(ConfigError) as error:
        agentrl.resume(unbroken.folder, "learner.learning_rate=0.5", "rollout.group_size=2", quiet=True)
    assert "learner.learning_rate: 0.001 -> 0.5" in str(error.value)
    assert "rollout.group_size: 4 -> 2" in str(error.value)
    agentrl.resume(unbroken.folder, "trainer.checkpoint_every=50", quiet=True)


def test_a_run_may_go_on_at_other_addresses(tmp_path: Path) -> None:
    there = ("engine.vllm.url=http://a:8000", "engine.vllm.weights_folder=/a")
    before = agentrl.Run(tmp_path, config(tmp_path, "engine.name=vllm", *there))
    here = ("engine.vllm.url=http://b:8000", "engine.vllm.weights_folder=/b", "rollout.ray.address=b:6379")
    moved = with_overrides(before, here).config
    assert moved.engine.vllm.url == "http://b:8000"
    assert moved.engine.vllm.weights_folder == "/b"
    assert moved.rollout.ray.address == "b:6379"


def test_a_run_may_go_on_with_fewer_processes(tmp_path: Path) -> None:
    dealt = "learner={backend: fsdp, launcher: ray, processes: 4}"
    moved = with_overrides(agentrl.Run(tmp_path, config(tmp_path, dealt)), ("learner.processes=2",))
    assert moved.config.learner.processes == 2


def test_a_corrupt_checkpoint_is_refused_by_name(unbroken: agentrl.Run, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(unbroken.folder, run)
    weights = run / "checkpoints" / "train-000004" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(CheckpointError, match=r"train-000004.*weights\.safetensors.*older"):
        agentrl.resume(run, quiet=True)
    (run / "checkpoints" / "train-000004" / "hashes.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete checkpoint"):
        agentrl.resume(run, quiet=True)


def test_a_run_is_evaluated_by_folder_and_by_record(unbroken: agentrl.Run, tmp_path: Path) -> None:
    panel = agentrl.make_panel("example/HotCold-v0", "test", 5)
    by_record: Evaluation = agentrl.evaluate(unbroken, panel, seed=0, temperature=0.0)
    recorded = unbroken.summary["policies"]["trained"]["greedy"]
    assert by_record.to_dict()["success_rate"] == recorded["success_rate"]
    assert agentrl.evaluate(str(unbroken.folder), panel, temperature=0.0) == by_record
    assert agentrl.evaluate(unbroken.model, panel, temperature=0.0) == by_record
    assert agentrl.evaluate(unbroken, temperature=0.0).panel_hash == recorded["panel_hash"]


def test_seeds_decide_everything(unbroken: agentrl.Run, tmp_path: Path) -> None:
    again = agentrl.train(config(tmp_path / "again"), quiet=True)
    same_results(unbroken.folder, again.folder)
    other = agentrl.train(config(tmp_path / "other", "seed=1"), quiet=True)
    one, two = (load_file(run.model / "model.safetensors") for run in (unbroken, other))
    assert not all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.split=trian", "did you mean 'train'"),
        ("env.id=example/HotCodl-v0", "did you mean 'example/HotCold-v0'"),
        ("env.kwargs={max_stepz: 3}", "max_steps"),
        ("evaluation.split=tset", "test"),
        ("evaluation.tasks=500", "500"),
        ("policy.path=/no/such/folder", "/no/such/folder"),
    ],
)
def test_a_mistake_is_found_before_a_folder_is_made(
    override: str, message: str, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    with pytest.raises(AgentRLError, match=re.escape(message)):
        agentrl.train(config(tmp_path, override), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_an_environment_without_an_expert_trains_from_scratch_only(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lonely(examples["hotcold"].HotCold):  # type: ignore[misc, name-defined]
        def __init__(self, split: str = "train", max_steps: int = 6) -> None:
            super().__init__(split, max_steps)

    agentrl.env.register("example/Lonely-v0", Lonely)
    lonely = "env.id=example/Lonely-v0"
    with pytest.raises(ConfigError, match=r"example/Lonely-v0 has no expert.*warm_start\.steps=0"):
        agentrl.train(config(tmp_path, lonely), quiet=True)
    run = agentrl.train(config(tmp_path, lonely, "warm_start.steps=0", "trainer.steps=1"), quiet=True)
    assert set(run.summary["policies"]) == {"random", "untrained", "trained"}


@pytest.mark.parametrize(("limit", "warned"), [(4, True), (96, False)])
def test_a_cut_first_observation_is_told(
    limit: int,
    warned: bool,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`guess a number from 1 to 15` has more than four tokens."""
    short = ("trainer.steps=0", "warm_start.steps=0", "evaluation.baselines=[]")
    agentrl.train(config(tmp_path, f"policy.max_observation_tokens={limit}", *short))
    assert ("cuts the first observation of 20 in 20 training tasks" in capsys.readouterr().out) is warned


def test_a_taken_name_is_refused(unbroken: agentrl.Run) -> None:
    with pytest.raises(ConfigError, match=r"run\.name is 'tiny'.*--resume"):
        agentrl.train(config(unbroken.folder.parent), quiet=True)


def test_too_many_aborted_episodes_stop_the_run_and_lose_nothing(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = examples["hotcold"].HotCold.step

    def breaking(self: Any, action: str) -> Any:
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        if metrics.exists() and len(rows(tmp_path / "tiny")) == 6:
            raise OSError("the wire was cut")
        return step(self, action)

    monkeypatch.setattr(examples["hotcold"].HotCold, "step", breaking)
    with pytest.raises(
        TooManyAbortedError,
        match=r"(?s)4 episodes were aborted, more than 3.2 allowed.*OSError: the wire was cut",
    ):
        agentrl.train(config(tmp_path), quiet=True)
    monkeypatch.undo()
    agentrl.resume(tmp_path / "tiny", quiet=True)
    assert len(rows(tmp_path / "tiny")) == 8


def test_every_task_comes_once_per_epoch_in_an_order_of_the_seed() -> None:
    tasks = [f"t{n}" for n in range(12)]
    order = TaskOrder(tasks, 3)
    first, second = [order[n] for n in range(12)], [order[n] for n in range(12, 24)]
    assert sorted(first) == sorted(second) == sorted(tasks)
    assert first != second
    assert [TaskOrder(tasks, 4)[n] for n in range(12)] != first
    assert TaskOrder(["only"], 0)[5] == "only"


def test_a_full_disk_ends_with_one_message_and_harms_nothing(unbroken: agentrl.Run, tmp_path: Path) -> None:
    """A file may grow to 100 kB: everything fits but the weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        answer = CliRunner().invoke(app, ["train", *TINY, f"run.folder={tmp_path}", "run.name=tiny"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.exit_code == 2
    assert "warm_start-000003: the checkpoint could not be saved" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert list((tmp_path / "tiny" / "checkpoints").iterdir()) == []
    agentrl.resume(tmp_path / "tiny", quiet=True)
    same_results(unbroken.folder, tmp_path / "tiny")


def test_steps_that_teach_nothing_are_told(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    said: list[str] = []
    alone = config(tmp_path, "rollout.group_size=1", "rollout.groups_per_step=1", "trainer.steps=11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "say", lambda self, text: said.append(text))
        agentrl.train(alone, quiet=True)
    told = [text for text in said if "nothing was learned in 10 steps: no group of 1" in text]
    assert len(told) == 1
