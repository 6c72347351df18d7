"""A Hugging Face folder with a chat template through the whole of a run, constrained and free."""

import datetime
import hashlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.utils import chat_template_utils

import agentrl
from agentrl.config import read_yaml
from agentrl.data.storage import read_episodes
from agentrl.errors import CheckpointError
from agentrl.policy.model import build_model, save_policy
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer
from agentrl.run.folder import open_run
from agentrl.run.policies import open_player

pytestmark = pytest.mark.usefixtures("undrawn")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning is dropped from every earlier reply, so no prompt extends the one before.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


def chat_folder(folder: Path, template: str) -> Path:
    texts = ["higher", "lower", "say a number", "guess a number from 1 to 15", "user assistant think action"]
    tokenizer: Any = fit_tokenizer(texts * 4, 400)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    model = build_model(replace(PolicyConfig(device="cpu"), hidden_size=32, heads=1), tokenizer, seed=0)
    save_policy(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["appending", "rewriting"])
@pytest.mark.parametrize("reply", ["plain", "action_tags", "think_action", "subgoal_action"])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_chat_model_trains(
    template: str, reply: str, constrained: bool, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        f"policy.path={chat_folder(tmp_path / 'chat', template)}",
        "policy.preset=scratch",
        f"policy.reply={reply}",
        "engine.max_tokens=24",
        f"rollout.constrained={str(constrained).lower()}",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "algorithm.drop_equal_groups=false",
        "warm_start.steps=2",
        "warm_start.demonstrations=24",
        "trainer.steps=1",
        "trainer.save_episodes_every=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[cloned]",
        f"run.folder={tmp_path}",
        "run.name=chat-run",
    )
    run = agentrl.train(config, quiet=True)
    episodes = read_episodes(run.folder / "episodes" / "train-000001.parquet")
    later = [turn for episode in episodes for turn in episode.turns[1:]]
    assert {turn.new_sequence for turn in later} == {template == FORGETFUL}
    if constrained:
        assert all(turn.valid for turn in later)
    assert agentrl.evaluate(run, temperature=0.0).to_dict()["aborted"] == 0


# Opens a think block, or closes it where it is told not to think; keeps earlier reasoning.
THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n<think>\n{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
    "{% endif %}",
)


@pytest.mark.parametrize(
    "template", [CHATML, FORGETFUL, THINKING], ids=["appending", "rewriting", "thinking"]
)
@pytest.mark.parametrize("constrained", [True, False])
def test_a_policy_that_plans_is_credited_for_switch_subgoal_and_action(
    template: str, constrained: bool, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        f"policy.path={chat_folder(tmp_path / 'chat', template)}",
        "policy.preset=scratch",
        "policy.reply=subgoal_action",
        "engine.max_tokens=96",
        "algorithm={name: hiper, change_penalty: 0.1}",
        f"rollout.constrained={str(constrained).lower()}",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "warm_start.steps=30",
        "warm_start.demonstrations=48",
        "trainer.steps=2",
        "trainer.save_episodes_every=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[]",
        f"run.folder={tmp_path}",
        "run.name=planning",
    )
    run = agentrl.train(config, quiet=True)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()][-2:]
    # Without menus this policy never says a number, so that all returns and values are 0.
    assert all((row["train/learner/term/value"] > 0) is constrained for row in rows)
    turns = [
        turn
        for step in (1, 2)
        for episode in read_episodes(run.folder / "episodes" / f"train-00000{step}.parquet")
        for turn in episode.turns
    ]
    for turn in turns:
        parts = turn.info["parts"]
        assert parts["action"][1] == len(turn.action_ids)
        assert constrained is False or turn.valid
    planned = [turn.info["parts"] for turn in turns if "switch" in turn.info["parts"]]
    share = [row["train/algorithm/hiper/planned"] for row in rows]
    assert (sum(share) > 0) is any("subgoal" in parts for parts in planned)


def thinking_run(folder: Path, *more: str) -> agentrl.Run:
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        f"policy.path={chat_folder(folder / 'chat', THINKING)}",
        "policy.preset=scratch",
        "policy.reply=think_action",
        "engine.max_tokens=56",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "algorithm.drop_equal_groups=false",
        "warm_start.steps=2",
        "warm_start.demonstrations=24",
        "trainer.steps=2",
        "trainer.save_episodes_every=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[]",
        f"run.folder={folder}",
        "run.name=thinking-run",
        *more,
    )
    return agentrl.train(config)


def test_a_constrained_policy_learns_from_thoughts_and_commands(
    examples: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = thinking_run(tmp_path)
    turns = [
        turn
        for step in (1, 2)
        for episode in read_episodes(run.folder / "episodes" / f"train-00000{step}.parquet")
        for turn in episode.turns
    ]
    assert all(turn.valid for turn in turns)
    thoughts = [
        tuple(token for token, ids in zip(turn.action_ids, turn.allowed or (), strict=True) if ids is None)
        for turn in turns
    ]
    assert len(set(thoughts)) == len(turns) > 4
    # Of the numbers that an episode chooses from, one may be left in the end.
    chosen = [sum(ids is not None and len(ids) > 1 for ids in turn.allowed or ()) for turn in turns]
    assert sum(chosen) > len(turns) / 2
    steps = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    gaps = [step["train/algorithm/mismatch/max"] for step in steps if step.get("stage") == "train"]
    assert len(gaps) == 2
    assert max(gaps) < 2e-5
    assert "think" not in capsys.readouterr().out.replace("thinking-run", "")


def test_a_template_that_is_told_not_to_think_is_told_so_wherever_the_run_is_played(
    examples: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = thinking_run(tmp_path, "policy.template_arguments.enable_thinking=false")
    assert "a closed think block already" in capsys.readouterr().out
    assert read_yaml(run.folder / "config.yaml")["policy"]["template_arguments"] == {"enable_thinking": False}
    evaluation = agentrl.evaluate(run, temperature=0.0)
    assert evaluation.to_dict()["aborted"] == 0
    player, config = open_player(str(run.folder))
    assert config.policy.template_arguments == {"enable_thinking": False}
    assert player._dialogue.thinking is None  # type: ignore[attr-defined]
    for episode in read_episodes(run.folder / "episodes" / "train-000001.parquet"):
        for turn in episode.turns:
            assert turn.valid
            assert None not in (turn.allowed or (None,))


def test_a_policy_that_has_no_room_to_think_says_so(
    examples: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking_run(tmp_path, "engine.max_tokens=4", "trainer.steps=1", "warm_start.steps=0")
    assert "warning: engine.max_tokens=4 leaves no room to think" in capsys.readouterr().out


# A template that writes the date, as Llama 3's.
DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML


def be_on(day: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Calendar(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Calendar":
            return cls(2031, 5, day, 12, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Calendar)


@pytest.fixture(scope="module")
def dated(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    """A run of the third of May."""
    folder = tmp_path_factory.mktemp("dated")
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        f"policy.path={chat_folder(folder / 'chat', DATED)}",
        "policy.preset=scratch",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "rollout.placement=inline",
        "warm_start.steps=0",
        "trainer.steps=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[]",
        f"run.folder={folder}",
        "run.name=dated",
    )
    with pytest.MonkeyPatch.context() as patch:
        be_on(3, patch)
        return agentrl.train(config, quiet=True)


def test_the_manifest_keeps_what_prompts_begin_with(dated: agentrl.Run) -> None:
    prompt = json.loads((dated.folder / "manifest.json").read_text())["prompt"]
    assert prompt["opening"].startswith("Today: 03 May 2031\n<|im_start|>user\nYou act in a text environment")
    assert prompt["template_sha256"] == hashlib.sha256(DATED.encode()).hexdigest()
    assert len(prompt["sha256"]) == 64


def test_a_run_whose_prompts_read_otherwise_today_says_so_and_goes_on(
    dated: agentrl.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (dated.folder / "manifest.json").read_text()
    be_on(4, monkeypatch)
    agentrl.resume(dated.folder)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("warning: the prompts of") == 1
    assert "'Today: 03 May 2031'" in shown
    assert "'Today: 04 May 2031'" in shown
    with pytest.warns(RuntimeWarning, match="had 'Today: 03 May 2031' and now has 'Today: 04 May 2031'"):
        agentrl.resume(dated.folder, quiet=True)
    with pytest.warns(RuntimeWarning, match="had 'Today: 03 May 2031' and now has 'Today: 04 May 2031'"):
        agentrl.evaluate(dated, temperature=0.0)
    assert (dated.folder / "manifest.json").read_text() == before


def test_a_run_whose_prompts_read_as_before_says_nothing(
    dated: agentrl.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_on(3, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        agentrl.resume(dated.folder, quiet=True)
        agentrl.evaluate(dated, temperature=0.0)


def test_a_run_that_recorded_no_prompt_records_it_when_it_is_resumed(
    dated: agentrl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "older"
    shutil.copytree(dated.folder, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    recorded = manifest.pop("prompt")
    path.write_text(json.dumps(manifest))
    be_on(3, monkeypatch)
    agentrl.resume(folder, quiet=True)
    assert json.loads(path.read_text()) == manifest | {"prompt": recorded}
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged, not JSON"):
        agentrl.resume(folder, quiet=True)
    path.unlink()
    agentrl.resume(folder, quiet=True)


def test_a_run_records_the_commit_of_its_model_and_keeps_the_template_it_was_given(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = "a" * 40, "b" * 40
    model = tmp_path / "hub" / "models--org--tiny"
    for commit in (first, second):
        (model / "snapshots" / commit).parent.mkdir(parents=True, exist_ok=True)
        chat_folder(model / "snapshots" / commit, "{{ raise_exception('another template') }}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        "policy.path=org/tiny",
        f"policy.chat_template={template}",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "warm_start.steps=0",
        "trainer.steps=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[]",
        f"run.folder={tmp_path}",
        "run.name=hub-run",
    )
    run = agentrl.train(config, quiet=True)
    made_from = json.loads((run.folder / "manifest.json").read_text())["model"]
    assert (made_from["name"], made_from["origin"], made_from["revision"]) == ("org/tiny", "hub", first)
    assert made_from["folder"] == str(model / "snapshots" / first)
    (model / "refs" / "main").write_text(second)  # a new commit does not change the run
    stored = open_run(run.folder).config.policy
    assert (stored.path, stored.revision) == ("org/tiny", first)
    template.unlink()  # it was saved with the trained model
    player, opened = open_player(str(run.folder))
    assert (opened.policy.path, opened.policy.revision) == (str(run.model), None)
    assert player._dialogue.wording.before_reply.endswith("<|im_start|>assistant\n")
