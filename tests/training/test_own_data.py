"""A run that starts from data of one's own: exported messages, stored episodes, the successes of a run."""

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chat_models import chat_model
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import Episode
from agentrl.errors import AgentRLError, CheckpointError, ConfigError
from agentrl.learn.learner import Learner
from agentrl.planning.preflight import problems
from agentrl.planning.topology import Topology
from agentrl.run.logger import RunLogger
from agentrl.run.records import read_manifest
from agentrl.run.signals import RunInterrupted
from agentrl.training import warm_start

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=2",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "warm_start.batch_size=2",
    "trainer.steps=1",
    "trainer.save_episodes_every=1",
    "policy.tokenizer_episodes=2",
    "policy.hidden_size=32",
    "policy.heads=1",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.placement=inline",
)


def config(folder: Path, *more: str, name: str = "tiny") -> agentrl.RunConfig:
    quiet: list[str] = []
    given = (*TINY, f"run.folder={folder}", f"run.name={name}", *more)
    return agentrl.load_config(None, *given, warn=quiet.append)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(
    model: Path, examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> agentrl.Run:
    """A run of a chat model that chooses among the actions, and solves some tasks by chance."""
    more = (f"policy.path={model}", "warm_start.steps=0", "trainer.steps=2", "policy.max_context=512")
    return agentrl.train(config(tmp_path_factory.mktemp("source"), *more), quiet=True)


@pytest.fixture
def cloned(monkeypatch: pytest.MonkeyPatch) -> list[Episode]:
    """The episodes that are cloned, once each."""
    found: list[Episode] = []
    batches = warm_start.cloning_batches

    def noting(config: Any, episodes: Sequence[Episode], first: int = 0) -> Any:
        found.extend(episodes)
        return batches(config, episodes, first)

    monkeypatch.setattr(warm_start, "cloning_batches", noting)
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run says of its data."""
    lines: list[str] = []
    say = RunLogger.say

    def noting(self: RunLogger, line: str) -> None:
        lines.extend([line] if "left out" in line else [])
        say(self, line)

    monkeypatch.setattr(RunLogger, "say", noting)
    return lines


def stored(run: agentrl.Run) -> list[Episode]:
    return [each for path in sorted(run.folder.glob("episodes/train-*")) for each in read_episodes(path)]


def exported(run: agentrl.Run, to: Path, *options: str) -> list[dict[str, Any]]:
    words = ["export", str(run.folder), "--format", "messages", "--to", str(to), *options]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in to.read_text().splitlines()]


def test_messages_are_exported_with_what_is_known_of_them(source: agentrl.Run, tmp_path: Path) -> None:
    episodes, rows = stored(source), exported(source, tmp_path / "all.jsonl")
    assert [row["success"] for row in rows] == [episode.success for episode in episodes]
    for row, episode in zip(rows, episodes, strict=True):
        assert row["turns"] == len(episode.turns) == len(row["messages"]) // 2
        assert (row["task"], row["return"], row["stop"]) == (
            episode.task,
            episode.episode_return,
            episode.stop.value,
        )
        assert [message["content"] for message in row["messages"][1::2]] == [
            turn.action for turn in episode.turns
        ]
        assert [m["content"] for m in row["messages"][2::2]] == [
            turn.observation for turn in episode.turns[1:]
        ]
        assert row["messages"][0]["content"].endswith(f"\n\n{episode.turns[0].observation}")
    solved = exported(source, tmp_path / "solved.jsonl", "--successes")
    assert solved == [row for row in rows if row["success"]]
    assert 0 < len(solved) < len(rows)
    played = exported(source, tmp_path / "trained.jsonl", "--episodes", "trained-greedy")
    assert {row["task"] for row in played} == {"test/0", "test/1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "."), "exists; choose a new file"),
        (("--to", "no/such/file.jsonl"), "there is no folder no/such"),
        (("--to", "new.jsonl", "--episodes", "evaluated-*"), r"has no evaluated-*.parquet"),
        (("--to", "new.jsonl", "--merge"), "--merge: wanted with --format model only"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    options: Sequence[str], message: str, source: agentrl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", str(source.folder), "--format", "messages", *options])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_clones_exported_messages(
    source: agentrl.Run, model: Path, tmp_path: Path, cloned: list[Episode], said: list[str]
) -> None:
    rows = exported(source, tmp_path / "all.jsonl")
    more = (f"policy.path={model}", "warm_start.steps=2", f"warm_start.data={tmp_path / 'all.jsonl'}")
    run = agentrl.train(config(tmp_path, *more), quiet=True)
    wanted = [episode for episode in stored(source) if episode.success]
    assert [[turn.prompt_ids + turn.action_ids for turn in each.turns] for each in cloned] == [
        [turn.prompt_ids + turn.action_ids for turn in each.turns] for each in wanted
    ]
    tasks, replies = {each.task for each in wanted}, [turn for each in wanted for turn in each.turns]
    assert said == [
        f"warm_start.data={tmp_path}/all.jsonl: chat messages, in the policy's prompts: {len(wanted)} "
        f"episodes of {len(tasks)} tasks, {len(replies)} replies to learn from; left out: "
        f"{len(rows) - len(wanted)} not successful"
    ]
    assert run.config.warm_start.own_data == "warm_start.data"


def test_a_run_clones_the_successes_of_another_with_their_own_tokens(
    source: agentrl.Run, model: Path, tmp_path: Path, cloned: list[Episode], said: list[str]
) -> None:
    more = (f"policy.path={model}", "warm_start.steps=1", f"warm_start.from={source.folder}")
    agentrl.train(config(tmp_path, *more), quiet=True)
    wanted: dict[Any, Episode] = {}
    for each in stored(source):
        if each.success:
            wanted.setdefault((each.task, tuple(turn.action_ids for turn in each.turns)), each)
    assert [each.id for each in cloned] == [each.id for each in wanted.values()]
    assert [turn.allowed for each in cloned for turn in each.turns] == [
        turn.allowed for each in wanted.values() for turn in each.turns
    ]
    assert "with their own tokens" in said[0]
    assert "not successful" in said[0]


def test_another_tokenizer_reads_them_in_its_own_prompts(
    source: agentrl.Run, tmp_path: Path, cloned: list[Episode], said: list[str]
) -> None:
    files = sorted(map(str, source.folder.glob("episodes/train-*")))
    for number, key in enumerate((f"from={source.folder}", f"data={json.dumps(files)}")):
        cloned.clear()
        agentrl.train(
            config(tmp_path, f"warm_start.{key}", "warm_start.steps=1", name=f"run-{number}"), quiet=True
        )
        wanted = [each for each in stored(source) if each.success]
        texts = [(turn.observation, turn.action) for each in wanted for turn in each.turns]
        found = [(turn.observation, turn.action) for each in cloned for turn in each.turns]
        assert set(found) == set(texts)
        assert key.startswith("from") or found == texts
        assert all("in the policy's prompts" in line for line in said)


def test_trajectories_of_others_are_written_as_they_are(
    model: Path, examples: dict[str, ModuleType], tmp_path: Path, cloned: list[Episode], said: list[str]
) -> None:
    turns = [
        ("human", None, "Guess."),
        ("gpt", False, "OK"),
        ("human", None, "from 1"),
        ("gpt", True, "Act: 7"),
    ]
    listed = [dict(zip(("from", "loss", "value"), turn, strict=True)) for turn in turns]
    (tmp_path / "t.json").write_text(
        json.dumps([{"item_id": f"x_{k}", "conversations": listed} for k in "abc"])
    )
    more = (f"policy.path={model}", "warm_start.steps=1", f"warm_start.data={tmp_path / 't.json'}")
    agentrl.train(config(tmp_path, *more), quiet=True)
    assert said[0].endswith(
        "t.json: AgentGym trajectories, as they are, not in the policy's prompts: 3 episodes of 3 tasks, "
        "3 replies to learn from and 3 that are context; left out: none"
    )
    assert [turn.trainable for turn in cloned[0].turns] == [False, True]


def data_file(folder: Path, count: int = 6, **more: Any) -> Path:
    path = folder / "own.jsonl"
    rows = [
        [("user", f"guess from {k}"), ("assistant", f"{k + 7}"), ("user", "lower"), ("assistant", f"{k + 3}")]
        for k in range(count)
    ]
    listed = [[dict(zip(("role", "content"), each, strict=True)) for each in row] for row in rows]
    path.write_text("".join(json.dumps({"messages": row} | more) + "\n" for row in listed))
    return path


def stop_cloning_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Learner.update

    def interrupting(self: Learner, batch: Any, algorithm: Any, context: Any) -> Any:
        if context.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, batch, algorithm, context)

    monkeypatch.setattr(Learner, "update", interrupting)


@pytest.fixture
def stopped(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[agentrl.RunConfig, Path]:
    """A run that was stopped after two of five steps of cloning, and its data."""
    data = data_file(tmp_path)
    begun = config(tmp_path, f"warm_start.data={data}", "warm_start.steps=5")
    with monkeypatch.context() as patch:
        stop_cloning_at(1, patch)
        with pytest.raises(RunInterrupted):
            agentrl.train(begun, quiet=True)
    assert (tmp_path / "tiny/checkpoints/warm_start-000002").is_dir()
    return begun, data


def test_a_run_that_is_stopped_while_it_clones_goes_on_bit_for_bit(
    stopped: tuple[agentrl.RunConfig, Path], tmp_path: Path
) -> None:
    begun, data = stopped
    with pytest.raises(ConfigError, match=r"warm_start\.data.* repeat them:\nagentrl train --resume "):
        agentrl.resume(tmp_path / "tiny", quiet=True)
    agentrl.resume(tmp_path / "tiny", f"warm_start.data={data}", quiet=True)
    whole = agentrl.train(replace(begun, run=replace(begun.run, name="whole")), quiet=True)
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "tiny" / name).read_bytes() == (whole.folder / name).read_bytes()


def test_data_that_has_changed_since_is_refused(
    stopped: tuple[agentrl.RunConfig, Path], tmp_path: Path
) -> None:
    _, data = stopped
    before = data.read_text()
    data.write_text(before.replace("lower", "higher"))
    with pytest.raises(CheckpointError, match=rf"{data}: has changed since .*tiny began to clone it"):
        agentrl.resume(tmp_path / "tiny", f"warm_start.data={data}", quiet=True)
    data.write_text(before)
    run = agentrl.resume(tmp_path / "tiny", f"warm_start.data={data}", quiet=True)
    assert list((read_manifest(run.folder) or {})["warm_start_data"]) == [str(data)]
    # Once the cloning is over, nothing reads it.
    shutil.rmtree(run.folder / "model")
    data.unlink()
    agentrl.resume(tmp_path / "tiny", f"warm_start.data={data}", quiet=True)


def test_no_expert_is_needed(examples: dict[str, ModuleType], tmp_path: Path, cloned: list[Episode]) -> None:
    class Lonely(examples["hotcold"].HotCold):  # type: ignore[misc, name-defined]
        def __init__(self, split: str = "train", max_steps: int = 6) -> None:
            super().__init__(split, max_steps)

    agentrl.env.register("example/Alone-v0", Lonely)
    more = ("env.id=example/Alone-v0", "warm_start.steps=1", f"warm_start.data={data_file(tmp_path)}")
    agentrl.train(config(tmp_path, *more, "warm_start.demonstrations=1"), quiet=True)
    assert len(cloned) == 6


@pytest.mark.parametrize(
    ("row", "more", "reason"),
    [
        ({"success": False}, (), "6 not successful"),
        ({"task": "test/1"}, (), "6 of tasks that are evaluated on"),
        ({}, ("policy.max_context=12",), "6 longer than policy.max_context=12"),
    ],
)
def test_too_few_episodes_are_refused_before_anything_is_played(
    row: dict[str, Any],
    more: Sequence[str],
    reason: str,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    said: list[str],
) -> None:
    more = ("warm_start.steps=1", f"warm_start.data={data_file(tmp_path, **row)}", *more)
    with pytest.raises(ConfigError, match=r"warm_start\.data: 0 episodes are left to clone, wanted at least"):
        agentrl.train(config(tmp_path, *more, "evaluation.baselines=[random]"), quiet=True)
    assert said[0].endswith(f"left out: {reason}")
    assert not (tmp_path / "tiny/evaluations.json").exists()


def test_failures_are_cloned_where_they_are_asked_for(
    examples: dict[str, ModuleType], tmp_path: Path, cloned: list[Episode]
) -> None:
    data = data_file(tmp_path, success=False, task="test/1", env="another/World-v0")
    more = ("warm_start.only_successes=false", "warm_start.steps=1", f"warm_start.data={data}")
    agentrl.train(config(tmp_path, *more), quiet=True)
    assert [(each.success, each.task) for each in cloned] == [(False, "test/1")] * 6


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data=BROKEN", r"warm_start\.data: .*broken\.jsonl, line 2: messages is 3, wanted a list"),
        ("data=absent.jsonl", r"warm_start\.data: absent\.jsonl: cannot be read"),
        ("from=nowhere", r"warm_start\.from: nowhere: not a run"),
        ("from=EMPTY", r"warm_start\.from is .*empty', but .*episodes has no train-\*\.parquet"),
    ],
)
def test_broken_data_is_refused_before_a_folder_is_made(
    key: str, message: str, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data_file(tmp_path).read_text().splitlines()[0] + '\n{"messages": 3}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("")
    key = key.replace("BROKEN", str(broken)).replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(AgentRLError, match=message):
        agentrl.train(config(tmp_path, f"warm_start.{key}", "warm_start.steps=1"), quiet=True)
    assert not (tmp_path / "tiny").exists()
    begun = config(tmp_path, f"warm_start.{key}", "warm_start.steps=1")
    (planned,) = problems(begun, Topology(begun, 1, nodes=1))
    assert re.search(message, planned.text)
