"""What a run takes is said before it starts, and is what it then takes; what is missing is told at once."""

import json
import re
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.env import MultiTurnEnv, register
from agentrl.errors import ConfigError
from agentrl.run import plan as planning
from agentrl.run.footprint import checkpoint_bytes, skeleton, weight_bytes
from agentrl.run.plan import Plan, plan
from agentrl.run.trial import try_out
from agentrl.run.warm_start import cloning

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=5",
    "evaluation.every=2",
    "warm_start.steps=4",
    "warm_start.demonstrations=24",
    "trainer.steps=5",
    "trainer.checkpoint_every=1",
    "trainer.save_episodes_every=2",
    "policy.tokenizer_episodes=4",
    "policy.device=cpu",
    "rollout.groups_per_step=4",
    "rollout.group_size=3",
    "rollout.max_active=6",
    "rollout.placement=inline",
    "learner.epochs=2",
)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *TINY, f"run.folder={folder}", *more)


def amounts(found: Plan, section: str) -> dict[str, float | None]:
    return {line.what: line.amount for line in found.lines if line.section == section}


# A plan, and the run that follows.


@pytest.fixture(scope="module")
def planned(
    examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, agentrl.Run]:
    settings = config(tmp_path_factory.mktemp("planned"))
    return plan(settings), agentrl.train(settings, quiet=True)


def test_a_run_does_what_was_planned(planned: tuple[Plan, agentrl.Run]) -> None:
    found, run = planned
    work = amounts(found, "work")
    assert found.missing == ()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "train"]
    assert work["optimiser steps"] == sum(row["learner/updates"] for row in trained) == 10
    assert work["cloning steps"] == len(rows) - len(trained) == 4
    assert (work["episodes of a step"], work["episodes of training"]) == (12, 60)
    evaluations = json.loads((run.folder / "evaluations.json").read_text())
    played = sum(
        found["episodes"] + found["aborted"]
        for name, decodings in evaluations.items()
        if name != "instruction_check"
        for found in decodings.values()
    )
    # Random and expert once; untrained, cloned, trained and those after steps 2 and 4 twice; 5 tasks each.
    assert work["episodes of evaluation"] == played == 60


def test_a_run_leaves_on_disk_what_was_planned(planned: tuple[Plan, agentrl.Run]) -> None:
    found, run = planned
    disk = amounts(found, "disk")
    sizes = [
        sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")
        for folder in (run.folder / "checkpoints").iterdir()
    ]
    assert 2 <= len(sizes) <= 3
    # The tokenizer found fewer merges than the vocabulary that was asked for and planned with.
    vocabulary = json.loads((run.model / "config.json").read_text())["vocab_size"]
    exact = config(run.folder, f"policy.vocab_size={vocabulary}")
    computed = checkpoint_bytes(exact, exact.algorithm.build(), exact.learner)
    assert max(sizes) == pytest.approx(computed, rel=0.05)
    stages = ((cloning(), run.config.warm_start.learner), (run.config.algorithm.build(), run.config.learner))
    assert disk["checkpoints"] == 4 * max(checkpoint_bytes(run.config, *stage) for stage in stages)
    assert disk["trained policy"] == weight_bytes(skeleton(run.config.policy))


class Ballast(MultiTurnEnv):
    """Holds forty megabytes and ends at once."""

    splits = ("train", "test")

    def problems(self, split: str) -> list[int]:
        return list(range(5))

    def start(self, problem: int) -> str:
        self.ballast = b"x" * 40_000_000
        return "say anything"

    def act(self, action: str) -> tuple[str, float, bool]:
        return "done", 1.0, True


register("agentrl-tests/Ballast-v0", Ballast)


def test_what_another_environment_adds_is_weighed(tmp_path: Path) -> None:
    trial = try_out(config(tmp_path, "env.id=agentrl-tests/Ballast-v0"))
    assert 40e6 <= trial.environment < 60e6
    assert trial.worker > 60e6
    assert trial.turns == 1


def test_a_worker_is_weighed_and_leaves_nothing_behind(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    before = set(psutil.Process().children(recursive=True))
    trial = try_out(config(tmp_path))
    assert set(psutil.Process().children(recursive=True)) == before
    assert 2e7 < trial.worker < 2e9  # a Python with this package
    assert trial.environment < trial.worker / 2
    assert (trial.tasks, trial.panel) == (len(examples["hotcold"].HotCold().tasks("train")), 5)
    assert trial.turns > 0
    assert trial.stored > 0


def test_processes_are_counted_for_training_and_for_the_panel(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    more = ("rollout.placement=process", "rollout.workers.count=3", "rollout.workers.environments=1")
    found = plan(config(tmp_path, *more))
    counted = amounts(found, "processes")
    # Six episodes at a time would need two environments in each of three workers.
    assert (counted["trainer"], counted["environment workers"]) == (1, 6)
    memory = amounts(found, "memory")["environments"]
    more_processes = plan(config(tmp_path, *more, "learner.backend=fsdp"), processes=2)
    assert amounts(more_processes, "processes")["environment workers"] == 12
    assert amounts(more_processes, "processes")["trainer"] == 2
    assert amounts(more_processes, "memory")["environments"] == pytest.approx(2 * (memory or 0), rel=0.2)


def test_actors_of_all_processes_are_dealt_out_to_the_machines(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    found = plan(
        config(
            tmp_path,
            "rollout.placement=process",
            "rollout.backend=ray",
            "rollout.ray.actors=2",
            "rollout.workers.count=2",
            "learner.backend=fsdp",
        ),
        processes=4,
        nodes=2,
    )
    counted = amounts(found, "processes")
    # Four processes have two actors each, for training and for the panel: sixteen on two machines.
    assert (counted["trainer"], counted["Ray actors"], counted["environment workers"]) == (2, 8, 16)
    assert counted["Ray's own"] is None


def test_what_only_the_run_can_tell_is_named_as_unknown(planned: tuple[Plan, agentrl.Run]) -> None:
    found, _ = planned
    (line,) = [line for line in found.lines if line.amount is None]
    assert (line.section, line.what) == ("time", "a step")
    assert "unknown" in line.how


# What is missing.


def test_everything_that_is_missing_is_told_at_once(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    with socket.socket() as listener, socket.socket() as closed:
        listener.bind(("", 0))
        listener.listen()
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        silent = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(planning, "find_spec", lambda name: None)
        found = plan(
            config(
                tmp_path,
                "run.name=taken",
                "evaluation.tasks=10000",
                "policy.device=cuda" if not torch.cuda.is_available() else "policy.device=mps",
                f"policy.path={tmp_path / 'nowhere'}",
                "rollout.placement=process",
                "rollout.backend=ray",
                f"rollout.ray.address={silent}",
            ),
            processes=3,
        )
    wanted = (
        r"learner\.backend is single, wanted fsdp for 3 processes",
        r"rollout\.groups_per_step is 4, wanted a multiple of the 3 processes",
        r"torchrun --master-port: \d+ cannot be had",
        r"run\.name is 'taken', but .*taken exists",
        r"pip install 'agentrl\[ray\]'",
        rf"rollout\.ray\.address: nothing answers at {silent}",
        r"split 'test' of example/HotCold-v0 has \d+ tasks, wanted 10000",
        r"policy\.device is '(cuda|mps)', which this machine does not have",
        r"policy\.path is '.*nowhere', wanted the folder of a Hugging Face causal language model",
    )
    assert len(found.missing) == len(wanted), found.missing
    for pattern, line in zip(wanted, found.missing, strict=True):
        assert re.search(pattern, line), (pattern, line)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("env.id=no/Such-v0", "no/Such-v0"),
        ("env.split=trian", "trian"),
        ("rollout.ray.cpus=10000", "actors x cpus is 10000"),
        ("run.folder=/dev/null/runs", "run.folder is '/dev/null/runs', which cannot hold runs: /dev/null is"),
    ],
)
def test_an_absent_environment_machine_or_folder_is_named(
    key: str, words: str, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    more = ("rollout.backend=ray", "rollout.placement=process") if "ray" in key else ()
    found = plan(config(tmp_path, key, *more))
    assert any(words in line for line in found.missing), found.missing
    assert amounts(found, "memory")["weights"]


def test_too_little_memory_and_disk_are_named(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = namedtuple("free", "available free")(1000, 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    memory, disk = plan(config(tmp_path)).missing
    assert re.match(r"memory: at most .* wanted, 1.0 kB free; .*rollout\.max_active", memory)
    assert re.match(r"disk: at most .* wanted, 1.0 kB free", disk)


def test_more_gpus_and_gpu_memory_than_there_are_is_named(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000, 2000))
    found = plan(config(tmp_path, "learner.backend=fsdp"), processes=2)
    gpus, memory = found.missing
    assert gpus == "GPUs: 2 wanted on this machine, one for each process, and 1 found"
    assert re.match(r"GPU memory: at most .* wanted, 1.0 kB free", memory)
    assert set(amounts(found, "memory")) == {"program", "environments"}
    assert amounts(found, "GPU memory")["weights"] == weight_bytes(skeleton(config(tmp_path).policy)) // 2


def test_processes_that_do_not_fit_the_machines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="6 processes on 4 nodes: wanted as many on each"):
        plan(config(tmp_path), processes=6, nodes=4)


# The command.


def test_the_command_prints_a_table_or_json_and_its_exit_code_says_whether_anything_is_missing(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    arguments = ["plan", *TINY, f"run.folder={tmp_path}"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "nothing is missing" in shown.output
    assert re.search(r"episodes of a step +12", shown.output)
    printed = CliRunner().invoke(app, [*arguments, "--json", "--processes", "2"])
    assert printed.exit_code == 2
    tree = json.loads(printed.stdout)
    assert tree["missing"] == ["learner.backend is single, wanted fsdp for 2 processes"]
    assert {"section", "what", "amount", "unit", "how"} == set(tree["lines"][0])
    assert list(tmp_path.iterdir()) == []
