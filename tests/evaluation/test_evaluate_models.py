"""A model is evaluated with the keys of training: those of a file, and those of the command line."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from chat_models import chat_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.policy.model import load_tokenizer

FILE = """
env: {id: example/HotCold-v0}
evaluation: {split: test, tasks: 2}
policy: {path: null, device: cpu}
engine: {max_tokens: 4}
rollout: {max_turns: 2}
"""


@pytest.fixture(scope="module")
def model(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(FILE)
    return path


def played(model: Path, file: Path | None, *overrides: str) -> list[Episode]:
    episodes: list[Episode] = []
    agentrl.evaluate(model, config=file, overrides=overrides, on_episode=episodes.append, temperature=0.0)
    return episodes


def test_a_file_names_the_environment_the_panel_and_the_prompt(model: Path, file: Path) -> None:
    episodes = played(model, file, "policy.prompt=literature", "rollout.constrained=false")
    assert [(episode.env, len(episode.turns)) for episode in episodes] == [("example/HotCold-v0", 2)] * 2
    read = load_tokenizer(model).decode(episodes[0].turns[1].prompt_ids)
    assert "Steps taken so far: 1 of at most" in read
    assert episodes[0].turns[1].new_sequence
    assert all(turn.allowed is None for episode in episodes for turn in episode.turns)


def test_without_keys_the_prompt_is_plain_and_replies_are_chosen(model: Path, file: Path) -> None:
    first = max(played(model, file), key=lambda episode: len(episode.turns))
    assert "Steps taken so far" not in load_tokenizer(model).decode(first.turns[1].prompt_ids)
    assert not first.turns[1].new_sequence
    assert all(turn.allowed is not None for turn in first.turns)


def test_a_model_alone_gets_the_preset_of_its_size(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agentrl.evaluate(model, env="example/HotCold-v0", split="test", tasks=1, overrides=["policy.device=cpu"])
    assert "policy.preset=pretrained sets" in capsys.readouterr().err


def test_a_scripted_policy_reads_the_keys_of_the_rollout(file: Path, examples: dict[str, ModuleType]) -> None:
    episodes: list[Episode] = []
    panel = {"env": "example/HotCold-v0", "split": "test", "tasks": 2}
    agentrl.evaluate("random", **panel, overrides=["rollout.max_turns=1"], on_episode=episodes.append)
    assert [len(episode.turns) for episode in episodes] == [1, 1]


def test_an_unknown_key_is_refused_with_its_name(model: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.promt"):
        played(model, file, "policy.promt=react")


def test_the_command_line_takes_the_same_keys(model: Path, file: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    arguments = ["evaluate", "--policy", str(model), "--config", str(file), "--output", str(scores)]
    shown = CliRunner().invoke(app, [*arguments, "rollout.max_turns=1", "policy.prompt=literature"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(scores.read_text())
    assert (found["episodes"], found["mean_turns"]) == (2, 1.0)


def test_a_model_stands_beside_scripted_policies_and_its_result_names_it(
    model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"config": file, "placement": "inline", "output": tmp_path / "scores"}
    found = agentrl.evaluate_panels(["random", model], **options)
    assert capsys.readouterr().err.count("policy.preset=pretrained sets") == 1
    scores = {name: panels[0].evaluation for name, panels in found.scores.items()}
    (random, played) = scores.values()
    assert random is not None
    assert played is not None
    assert random.fingerprint is not None
    assert "prompt" not in random.fingerprint
    fingerprint = played.fingerprint
    assert fingerprint is not None
    assert fingerprint["policy"] | {"weights": ""} == {
        "name": str(model),
        "model": str(model),
        "revision": None,
        "checkpoint": None,
        "weights": "",
    }
    assert fingerprint["decoding"] == {
        "seed": 0,
        "temperature": 1.0,
        "constrained": True,
        "max_tokens": 4,
        "reply": "plain",
    }
    assert (fingerprint["dtype"], fingerprint["prompt"]["template"]) == ("bfloat16", "plain")
    assert len(fingerprint["prompt"]["wording"]) == 64
    # Played alone, all of it is the same; given again, the model is not even opened.
    alone = agentrl.evaluate(model, config=file, placement="inline")
    assert alone == played
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentrl.evaluation.suite.open_player", None)
        assert agentrl.evaluate_panels(["random", model], **options) == found


def test_other_weights_or_prompts_do_not_go_on_in_a_folder(model: Path, file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    options = {"config": file, "placement": "inline", "output": tmp_path / "scores"}
    agentrl.evaluate_panels([copy], **options)
    with pytest.raises(ConfigError, match=r'prompt\.template was "plain", is "react"'):
        agentrl.evaluate_panels([copy], **options, overrides=["policy.prompt=react"])
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"policy\.weights was \w{12}…, is \w{12}…"):
        agentrl.evaluate_panels([copy], **options)
