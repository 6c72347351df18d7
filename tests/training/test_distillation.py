"""A run that is taught: the divergence falls, the teacher is recorded, and a wrong one is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_models import CHATML, chat_model
from safetensors.torch import load_file, save_file

import agentrl
from agentrl.errors import AgentRLError, CheckpointError, ConfigError, RequirementError
from agentrl.planning.memory import learner_bytes
from agentrl.planning.preflight import check_run
from agentrl.run.records import read_manifest

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (
    "rollout.placement=inline",
    "rollout.groups_per_step=4",
    "evaluation.tasks=1",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "trainer.checkpoint_every=1",
    "trainer.save_episodes_every=0",
)
STUDENT = (
    "warm_start.steps=0",
    "trainer.steps=3",
    "policy.hidden_size=64",
    "learner.warmup_steps=0",
    "learner.learning_rate=3e-3",
    "learner.matrix_learning_rate=1e-2",
    "learner.mini_batches=4",
    "algorithm.name=distill",
)
PURE = "algorithm.reward_coefficient=0"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has cloned the expert a little."""
    started = agentrl.load_config(
        "quickstart.yaml",
        *SMALL,
        "trainer.steps=0",
        "warm_start.steps=60",
        "warm_start.demonstrations=240",
        f"run.folder={tmp_path_factory.mktemp('teacher')}",
        "run.name=teacher",
    )
    return agentrl.train(started, quiet=True).folder


def student(teacher: Path | str, folder: Path, *more: str) -> agentrl.RunConfig:
    given = (*SMALL, *STUDENT, f"learner.teacher={teacher}", f"run.folder={folder}", "run.name=student")
    return agentrl.load_config("quickstart.yaml", *given, *more)


def logged(run: Path, key: str) -> list[Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[f"train/{key}"] for row in rows if row["stage"] == "train"]


@pytest.mark.parametrize(
    ("mode", "key"), [("advantage", "algorithm/distill/kl"), ("loss", "learner/term/distill")]
)
def test_the_policy_comes_nearer_to_its_teacher_with_every_step(
    mode: str, key: str, teacher: Path, tmp_path: Path
) -> None:
    run = agentrl.train(student(teacher, tmp_path, PURE, f"algorithm.mode={mode}"), quiet=True)
    first, second, third = logged(run.folder, key)
    assert first > second > third > 0
    assert third < 0.7 * first
    # Groups without success, which teach nothing else, are kept.
    assert set(logged(run.folder, "rollout/groups_kept")) == {1.0}
    known = (read_manifest(run.folder) or {})["teacher"]
    assert known["source"] == str(teacher)
    assert len(known["sha256"]) == len(known["tokenizer"]) == 64
    saved = {file.name for file in (run.folder / "checkpoints").rglob("*") if file.is_file()}
    assert saved == {"hashes.json", "learner.pt", "progress.json", "weights.safetensors"}


def test_a_run_goes_on_with_the_same_teacher_only(teacher: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(teacher, tmp_path / "copy"))
    steps = ("trainer.schedule_steps=4", "trainer.steps=1", "algorithm.mode=loss")
    run = agentrl.train(student(copy, tmp_path, *steps), quiet=True)
    whole = agentrl.train(student(copy, tmp_path / "whole", *steps, "trainer.steps=2"), quiet=True)
    with pytest.raises(ConfigError, match=r"sets values that .*: learner\.teacher\. .*repeat"):
        agentrl.resume(run.folder, "trainer.steps=2", quiet=True)
    with pytest.raises(ConfigError, match=r"cannot be resumed with other values.*\nlearner\.teacher"):
        agentrl.resume(run.folder, "trainer.steps=2", f"learner.teacher={teacher}", quiet=True)

    weights = copy / "model" / "model.safetensors"
    kept, moved = weights.read_bytes(), load_file(weights)
    next(iter(moved.values()))[0] += 1
    save_file(moved, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"was taught by another model than learner\.teacher=.*sha256"):
        agentrl.resume(run.folder, "trainer.steps=2", f"learner.teacher={copy}", quiet=True)

    weights.write_bytes(kept)
    resumed = agentrl.resume(run.folder, "trainer.steps=2", f"learner.teacher={copy}", quiet=True)
    one, other = (each.model / "model.safetensors" for each in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_played(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.training.trainer.Trainer.run", lambda _: pytest.fail("it has begun"))
    with pytest.raises(ConfigError, match=r"learner\.teacher=.* has another tokenizer .* than the policy"):
        agentrl.train(student(teacher, tmp_path, "policy.vocab_size=300"), quiet=True)


def refused(folder: Path, teacher: Path | str, *more: str) -> str:
    with pytest.raises(AgentRLError) as told:
        check_run(student(teacher, folder, *more), 1)
    assert "\n" not in str(told.value)
    assert not list(folder.glob("student"))
    return str(told.value)


def test_a_teacher_and_a_method_that_reads_it_come_together(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    chosen = (f"policy.path={model}", "policy.preset=scratch", "policy.max_context=512")
    check_run(student(model, tmp_path, *chosen), 1)
    told = refused(tmp_path, model, *chosen, "algorithm.name=grpo")
    assert told.endswith(
        "but algorithm.name=grpo reads no teacher; wanted null, or a method that does, such as distill"
    )
    assert "reads no teacher" in refused(tmp_path, model, *chosen, "algorithm.beta=0")
    for mode in ("advantage", "loss"):
        with pytest.raises(RequirementError, match=r"learner\.teacher is null, wanted the model to learn"):
            check_run(student("null", tmp_path, f"algorithm.mode={mode}"), 1)
    with pytest.raises(ConfigError, match=r"teacher_dtype is bfloat16, wanted null without a teacher"):
        student("null", tmp_path, "learner.teacher_dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"warm_start\.learner\.teacher is 'x', wanted null"):
        student("null", tmp_path, "warm_start.learner.teacher=x")


def test_a_teacher_that_does_not_fit_the_policy_is_refused(tmp_path: Path) -> None:
    policy = chat_model(tmp_path / "policy")
    chosen = (f"policy.path={policy}", "policy.preset=scratch", "policy.max_context=512")
    check_run(student(policy, tmp_path, *chosen), 1)

    other = chat_model(tmp_path / "other", template=CHATML.replace("assistant", "agent"))
    assert "has another chat template than the policy" in refused(tmp_path, other, *chosen)
    assert "whose tokenizer is fitted, has none" in refused(tmp_path, other)

    short = chat_model(tmp_path / "short", positions=256)
    assert "reads 256 tokens, fewer than the policy's 512" in refused(tmp_path, short, *chosen)

    wide = Path(shutil.copytree(policy, tmp_path / "wide"))
    described = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(described | {"vocab_size": described["vocab_size"] + 8}))
    assert "output ids and the policy" in refused(tmp_path, wide, *chosen)

    larger = Path(shutil.copytree(policy, tmp_path / "larger"))
    stored = json.loads((larger / "tokenizer.json").read_text())
    stored["added_tokens"].append(
        {**stored["added_tokens"][-1], "id": described["vocab_size"], "content": "<x>"}
    )
    (larger / "tokenizer.json").write_text(json.dumps(stored))
    assert "has another tokenizer" in refused(tmp_path, larger, *chosen)

    for name in (str(tmp_path / "nothing"), "openai:gpt", "runs/nothing"):
        assert refused(tmp_path, name, *chosen).startswith(f"learner.teacher={name}: ")


def test_a_plan_counts_the_teacher(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    chosen = (f"policy.path={model}", "policy.preset=scratch", "policy.max_context=512")
    config = student(model, tmp_path, *chosen)
    algorithm = config.algorithm.build()
    weights = sum(value.nbytes for value in load_file(model / "model.safetensors").values())
    found = learner_bytes(config, algorithm, config.learner)
    assert found["teacher"][0] == weights
    assert found["a pass of the teacher"][0] > 0
    half = student(model, tmp_path, *chosen, "learner.teacher_dtype=bfloat16")
    assert learner_bytes(half, algorithm, half.learner, 1)["teacher"][0] == weights // 2
    dealt = student(model, tmp_path, *chosen, "learner.backend=fsdp")
    assert learner_bytes(dealt, algorithm, dealt.learner, 2)["teacher"][0] == weights // 2
    assert "teacher" not in learner_bytes(config, algorithm, config.warm_start.learner)
