"""Runs whose prompts are templates: recorded, compared, shown, and refused before they begin."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes
from agentrl.env import MultiTurnEnv, register
from agentrl.errors import CheckpointError, ConfigError
from agentrl.planning.preflight import check_prompt
from agentrl.policy.model import build_model, save_policy
from agentrl.policy.prompt import Example
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer
from agentrl.run.examples import find_examples, play_examples
from agentrl.run.policies import open_player
from agentrl.run.settings import RunConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["higher", "lower", "guess a number from 1 to 15", "You can do one of the following", "Step 1."]
    tokenizer: Any = fit_tokenizer(texts * 4, 400)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    block = replace(PolicyConfig(device="cpu"), hidden_size=32, heads=1, layers=1, max_context=2048)
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_policy(build_model(block, tokenizer, seed=0), tokenizer, folder)
    return folder


def config(folder: Path, chat_folder: Path, *more: str) -> RunConfig:
    return agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        f"policy.path={chat_folder}",
        "policy.max_context=2048",
        "rollout.groups_per_step=1",
        "rollout.group_size=2",
        "rollout.placement=inline",
        "warm_start.steps=1",
        "warm_start.demonstrations=12",
        "trainer.steps=1",
        "trainer.save_episodes_every=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[]",
        f"run.folder={folder}",
        "run.name=prompted",
        *more,
    )


def test_a_run_with_the_prompt_of_the_literature_records_it_and_notices_another(
    examples: dict[str, ModuleType], chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{# history: 1 #}\n{{ instructions }} {{ observation }} {{ actions | join(', ') }}")
    run = agentrl.train(config(tmp_path, chat_folder, f"policy.prompt={own}"))
    episodes = read_episodes(run.folder / "episodes" / "train-000001.parquet")
    assert all(turn.new_sequence for episode in episodes for turn in episode.turns)
    shown = " ".join(capsys.readouterr().out.split())
    assert "with history 1: each turn is a row of its own" in shown
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/rollout/cut_observations"] for row in rows if row["stage"] == "train"] == [0.0]
    recorded = json.loads((run.folder / "manifest.json").read_text())["prompt"]
    assert (recorded["prompt"], recorded["history"]) == (own.read_text(), 1)
    player, _ = open_player(str(run.folder))
    assert player._dialogue.wording.sha256 == recorded["sha256"]  # type: ignore[attr-defined]
    own.write_text(own.read_text() + "!")
    with pytest.warns(RuntimeWarning, match=r"have changed since it was made: policy\.prompt no longer says"):
        open_player(str(run.folder))
    own.unlink()
    with pytest.raises(ConfigError, match=r"policy\.prompt is '.*own\.jinja', wanted literature, plain"):
        open_player(str(run.folder))


def test_solved_examples_are_played_once_and_kept_with_the_run(
    examples: dict[str, ModuleType], chat_folder: Path, tmp_path: Path
) -> None:
    asked = ("policy.prompt=react", "policy.examples=2", "warm_start.steps=0", "evaluation.split=train")
    run = agentrl.train(config(tmp_path, chat_folder, *asked, "evaluation.tasks=100"), quiet=True)
    path = run.folder / "examples.json"
    kept = json.loads(path.read_text())
    assert [len(example["turns"]) > 0 for example in kept] == [True, True]
    assert kept[0] != kept[1]
    kept[0]["task"] = kept[0]["turns"][0][0] = "something else"
    path.write_text(json.dumps(kept))
    with pytest.warns(RuntimeWarning, match=r"policy\.examples no longer says what the policy"):
        player, _ = open_player(str(run.folder))
    shown = player._dialogue.wording.examples  # type: ignore[attr-defined]
    assert shown[0].task == "something else"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"examples\.json: damaged"):
        open_player(str(run.folder))


def test_examples_are_the_same_in_every_run_and_never_tasks_of_the_evaluation(
    examples: dict[str, ModuleType], chat_folder: Path, tmp_path: Path
) -> None:
    asked = config(tmp_path, chat_folder, "policy.prompt=react", "env.split=test")
    first = find_examples(asked)
    assert first == find_examples(replace(asked, seed=7))
    tasks = [f"test/{number}" for number in range(30)]
    # Their observations name the numbers to guess from, and so the task.
    others = [play_examples(asked, excluded=tasks[:left_out])[0] for left_out in (0, 29)]
    assert others[0] == first[0]
    assert isinstance(others[1], Example)
    with pytest.raises(ConfigError, match=r"shows policy\.examples=1 .* solved 0 of 0 training tasks"):
        play_examples(asked, excluded=tasks)


class Short(MultiTurnEnv):
    """An environment without an expert, whose first observation is long and names the task last."""

    def problems(self, split: str) -> list[int]:
        return list(range(4))

    def start(self, problem: int) -> str:
        return "a wall " * 60 + f"say {problem}"

    def info(self) -> dict[str, Any]:
        return {"task_text": f"say {self.task}"}

    def act(self, action: str) -> tuple[str, float, bool]:
        return "a wall", 1.0, True


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (("policy.prompt=react",), r"has no expert to solve them .* wanted policy\.examples=0"),
        (
            ("policy.prompt=react", "policy.examples=0", "policy.max_context=120"),
            r"the first prompt of task train/0 has \d+ tokens, and a reply up to 64, but policy\.max",
        ),
        (("policy.prompt=vanished",), r"policy\.prompt is 'vanished'"),
        (
            ("policy.path=null", "policy.prompt=react"),
            r"policy\.prompt is 'react', but the tokenizer",
        ),
        (("policy.history=0",), r"policy\.history"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_a_folder_is_made(
    chat_folder: Path, tmp_path: Path, changed: tuple[str, ...], wanted: str
) -> None:
    register("test/Short-v0", Short)
    with pytest.raises(ConfigError, match=wanted):
        agentrl.train(config(tmp_path, chat_folder, "env.id=test/Short-v0", "warm_start.steps=0", *changed))
    assert list(tmp_path.iterdir()) == []


def test_plan_finds_a_prompt_that_cannot_be_used() -> None:
    check_prompt(PolicyConfig())
    with pytest.raises(ConfigError, match=r"policy\.system_message is 'Be brief\.'"):
        check_prompt(PolicyConfig(system_message="Be brief."))


def prompt_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["prompt", *arguments], prog_name="agentrl")


def test_the_command_prints_what_the_policy_reads(examples: dict[str, ModuleType], chat_folder: Path) -> None:
    asked = (
        "env.id=example/HotCold-v0",
        "rollout.placement=inline",
        f"policy.path={chat_folder}",
        "policy.prompt=literature",
    )
    result = prompt_command(*asked, "--turns", "2", "--task", "train/1")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "policy.prompt=literature (written anew, history 2)" in text
    assert "task train/1, played by its expert" in text
    assert text.count("<|im_start|> assistant") == 2
    assert "Steps taken so far: 1 of at most 4." in text
    found = json.loads(prompt_command(*asked, "--json").stdout)
    assert [turn["turn"] for turn in found["turns"]] == [1, 2, 3][: len(found["turns"])]
    assert all(turn["begins"] and not turn["cut"] for turn in found["turns"])
    one = found["turns"][0]
    assert one["sequence_tokens"] == one["prompt_tokens"] + one["reply_tokens"]
    refused = prompt_command(*asked, "--task", "train/9999")
    assert (refused.exit_code, "error: " in refused.stderr) == (2, True)


def test_the_command_plays_by_chance_without_an_expert_and_tells_of_cuts(chat_folder: Path) -> None:
    register("test/Short-v0", Short)
    asked = ("env.id=test/Short-v0", "rollout.placement=inline", "policy.max_observation_tokens=20")
    found = json.loads(prompt_command(*asked, f"policy.path={chat_folder}", "--json").stdout)
    assert (found["player"], [turn["cut"] for turn in found["turns"]]) == ("random", [True])
    assert "say train/0" in found["turns"][0]["prompt"]
    fitted = json.loads(prompt_command(*asked, "--json").stdout)
    assert fitted["turns"][0]["prompt"].startswith("<task>")
