import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from agentrl.errors import CheckpointError, ConfigError
from agentrl.policy.engine import GenerationRequest, SamplingParams
from agentrl.policy.model import end_ids, hidden_states, load_policy, output_weight, save_policy
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import RoleDialogue
from agentrl.policy.torch_engine import TorchEngine
from agentrl.run.policies import load


@pytest.fixture
def folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    save_policy(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def _logprobs(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(5, 25)
    with torch.no_grad():
        return (hidden_states(model, tokens, torch.tensor([12, 8])) @ output_weight(model).T).log_softmax(-1)


def test_a_saved_folder_opened_by_the_library_gives_the_same_logprobs(
    model: PreTrainedModel, folder: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(5, 25)
    with torch.no_grad():
        theirs = torch.cat([plain(row[None]).logits[0].log_softmax(-1) for row in tokens.split([12, 8])])
    torch.testing.assert_close(_logprobs(model), theirs, atol=1e-5, rtol=0)


def test_a_saved_policy_comes_back_the_same(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    again, words = load_policy(folder, device="cpu")
    assert torch.equal(_logprobs(model), _logprobs(again))
    text = "take mug 1 from desk 1"
    assert RoleDialogue(words).encode_reply(text) == RoleDialogue(tokenizer).encode_reply(text)


def test_the_folder_holds_no_pickle(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    with torch.no_grad():
        output_weight(model).mul_(2.0)
    save_policy(model, tokenizer, folder)
    assert os.listdir(folder.parent) == ["model"]
    assert torch.equal(_logprobs(load_policy(folder, device="cpu")[0]), _logprobs(model))


def test_a_save_that_fails_leaves_what_was_there(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(path: str, **given: object) -> None:
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_policy(model, tokenizer, folder)
    assert os.listdir(folder.parent) == ["model"]
    assert (folder / "model.safetensors").read_bytes() == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (
            lambda folder: (folder / "generation_config.json").write_text("{"),
            "generation_config.*cannot be read",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors"),
        (lambda folder: _truncate(folder / "model.safetensors"), "cannot be read"),
        (
            lambda folder: _change_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3),
            "weights are absent or do not fit",
        ),
        (lambda folder: _change_config(folder, intermediate_size=100), "do not fit|cannot be read"),
    ],
)
def test_a_damaged_folder_is_named_with_what_is_wrong(folder: Path, damage, words: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_policy(folder, device="cpu")
    assert str(folder) in str(caught.value)


def _change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_generation(folder: Path, ids: object) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids}))


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (4, 4, {4}),
        (4, [9, 70], {4, 9, 70}),
        ([4, 71], None, {4, 71}),
        (None, 9, {9}),
        (4, [9, 320, 10**9, -1], {4, 9}),
    ],
)
def test_ids_that_end_a_text_are_read_from_the_folder_and_kept_when_it_is_saved(
    folder: Path, config: object, generation: object, wanted: set[int]
) -> None:
    _change_config(folder, eos_token_id=config)
    _change_generation(folder, generation)
    model, tokenizer = load_policy(folder, device="cpu")
    assert end_ids(model) == wanted
    again = folder.parent / "again"
    save_policy(model, tokenizer, again)
    assert end_ids(load_policy(again, device="cpu")[0]) == wanted


def test_a_free_reply_ends_at_any_of_the_folders_ends(folder: Path) -> None:
    _change_generation(folder, list(range(5, 300)))
    policy = load(folder, PolicyConfig(device="cpu"))
    assert policy.dialogue.stop_ids == {4, *range(5, 300)}
    engine = TorchEngine(policy.model, stop_ids=policy.dialogue.stop_ids)
    engine.submit(GenerationRequest("a", (1, 7, 3), True, None, 0, SamplingParams(max_tokens=64)))
    while not (done := engine.step()):
        pass
    assert done[0].finish == "stop"
    assert len(done[0].token_ids) < 64
    assert done[0].token_ids[-1] in policy.dialogue.stop_ids


@pytest.mark.parametrize("ids", ["<end>", [4, "5"], 4.5, True, {"id": 4}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_id_is_refused(folder: Path, name: str, ids: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids}))
    with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id is .*wanted a token id or a list"):
        load_policy(folder, device="cpu")


def test_a_missing_folder_is_never_looked_for_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_policy(tmp_path / "gpt2", device="cpu")


def test_a_device_that_is_absent_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"policy\.device is 'cuda'"):
        load_policy(folder, device="cuda")
