"""A run that learns adapters leaves them for peft, and never the weights below them."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_damaged_runs import TINY
from torch import Tensor
from transformers import AutoModelForCausalLM

import agentrl
from agentrl.errors import CheckpointError, ConfigError
from agentrl.learn.lora import merge_adapters
from agentrl.learn.sharding import stored_shards
from agentrl.policy.engine import Adapter
from agentrl.policy.model import hidden_states, load_policy, output_weight
from agentrl.policy.torch_engine import TorchEngine
from agentrl.run.checkpoint import checkpoints
from agentrl.run.weights import SavedPolicy, export, find_policy, load_saved

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (
    *TINY,
    "evaluation.baselines=[]",
    "trainer.checkpoint_every=1",
    "algorithm={name: grpo, drop_equal_groups: false, entropy_coefficient: 0.1, kl_coefficient: 0.1}",
)
LORA = ("learner.lora.rank=2", "learner.lora.targets=[q_proj, down_proj]")
CLONED_LORA = ("warm_start.learner.lora.rank=2", "warm_start.learner.lora.targets=[q_proj]")


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *SMALL, f"run.folder={folder}", "run.name=tiny", *more)


def trained(folder: Path, *more: str) -> agentrl.Run:
    return agentrl.train(config(folder, *more), quiet=True)


@pytest.fixture(scope="module")
def base(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that others trained."""
    return trained(tmp_path_factory.mktemp("base"), "trainer.steps=0").model


@pytest.fixture(scope="module")
def over(base: Path, tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    """Adapters over that model."""
    return trained(tmp_path_factory.mktemp("over"), *LORA, f"policy.path={base}", "warm_start.steps=0")


@pytest.fixture(scope="module")
def cloned(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    """Adapters over weights that the same run cloned in full."""
    return trained(tmp_path_factory.mktemp("cloned"), *LORA, "trainer.keep_checkpoints=null")


TOKENS = torch.arange(3, 11)


def own_logits(model: Any) -> Tensor:
    with torch.no_grad():
        states = hidden_states(model, TOKENS, torch.tensor([len(TOKENS)]))
        return states @ output_weight(model).T


def peft_logits(base: Path, adapter: Path) -> Tensor:
    import peft

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        logits: Tensor = model(TOKENS[None]).logits[0]
    return logits


def test_a_target_that_the_policy_lacks_is_refused_before_a_folder_is_made(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match="targets is qproj, wanted some of the policy's linear layers: down_"
    ):
        trained(tmp_path, "learner.lora.targets=[qproj]")
    assert not list(tmp_path.iterdir())


def test_peft_loads_the_adapters_and_says_what_the_trained_policy_says(over: agentrl.Run, base: Path) -> None:
    assert not over.model.exists()
    said = json.loads((over.adapter / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["r"]) == (str(base), 2)
    assert sorted(said["target_modules"]) == ["down_proj", "q_proj"]
    found = find_policy(over.folder)
    assert found is not None
    merged = own_logits(load_saved(found)[0])
    torch.testing.assert_close(peft_logits(base, over.adapter), merged, rtol=0, atol=1e-5)
    assert (merged - own_logits(load_policy(base)[0])).abs().max() > 1e-4


class AdapterEngine(TorchEngine):
    """Takes adapters as vLLM does, over the weights that it was given last."""

    def __init__(self, model: Any, **limits: Any) -> None:
        super().__init__(copy.deepcopy(model), **limits)
        self.given, self.base = model, copy.deepcopy(model)
        self.sent: list[tuple[int, bool]] = []

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        self.sent.append((version, adapter is not None))
        if adapter is None:
            self.base.load_state_dict(self.given.state_dict())
        self.model.load_state_dict(self.base.state_dict())
        if adapter is not None:
            merge_adapters(self.model, adapter.weights, adapter.alpha / adapter.rank)
        super().refresh(version)


@pytest.mark.parametrize("given", [(), CLONED_LORA], ids=["cloned in full", "cloned adapters"])
def test_an_engine_that_takes_adapters_gets_their_base_once_and_plays_as_one_with_merged_weights(
    given: tuple[str, ...], examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = trained(tmp_path / "merged", *LORA, *given)
    opened: list[AdapterEngine] = []

    def open_engine(model: Any, *_: Any, adapters: Any, address: Any, **limits: Any) -> AdapterEngine:
        assert (adapters.rank, set(adapters.targets)) == (2, {"q_proj", "down_proj"})
        opened.append(AdapterEngine(model, **limits))
        return opened[-1]

    monkeypatch.setattr("agentrl.run.policies.open_engine", open_engine)
    monkeypatch.setattr("agentrl.planning.preflight.check_engine", lambda *_, **__: None)
    sent = trained(tmp_path / "sent", *LORA, *given, "engine.name=vllm")
    one, other = (path.adapter / "adapter_model.safetensors" for path in (merged, sent))
    assert one.read_bytes() == other.read_bytes()
    steps = merged.config.trainer.steps
    cloning = [(step, bool(given)) for step in (0, merged.config.warm_start.steps)]
    assert opened[0].sent == [*cloning, (0, False), *((step, True) for step in range(steps + 1))]


def test_checkpoints_hold_adapters_only_and_a_resumed_run_ends_the_same(
    over: agentrl.Run, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(over.folder, run)
    newest = checkpoints(run / "checkpoints")[-1]
    assert {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()} == {
        *("hashes.json", "learner.pt", "progress.json"),
        *(f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "base.json")),
    }
    shutil.rmtree(newest)
    shutil.rmtree(run / "adapter")
    agentrl.resume(run, quiet=True)
    one, other = (path / "adapter/adapter_model.safetensors" for path in (run, over.folder))
    assert one.read_bytes() == other.read_bytes()


def test_a_base_that_changed_or_is_gone_is_refused_by_resume_and_evaluate(
    over: agentrl.Run, base: Path, tmp_path: Path
) -> None:
    run, moved = tmp_path / "tiny", tmp_path / "base"
    shutil.copytree(over.folder, run)
    shutil.copytree(base, moved)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(base), str(moved)))
    for place in (run / "adapter", checkpoints(run / "checkpoints")[-1] / "adapter"):
        record = json.loads((place / "base.json").read_text())
        (place / "base.json").write_text(json.dumps(record | {"path": str(moved)}))
    newest = checkpoints(run / "checkpoints")[-1]
    sign(newest, "adapter/base.json")
    assert agentrl.evaluate(str(run), temperature=0.0) == agentrl.evaluate(over, temperature=0.0)
    model, _ = load_policy(moved)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    model.save_pretrained(moved)
    for work in (agentrl.evaluate, agentrl.resume):
        with pytest.raises(CheckpointError, match=r"learned over other weights than .*base holds now"):
            work(str(run))
    shutil.rmtree(moved)
    for work in (agentrl.evaluate, agentrl.resume):
        with pytest.raises(CheckpointError, match=str(moved)):
            work(str(run))


def sign(checkpoint: Path, name: str) -> None:
    hashes = json.loads((checkpoint / "hashes.json").read_text())
    hashes[name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "hashes.json").write_text(json.dumps(hashes))


def test_a_base_that_the_run_trained_itself_is_saved_once(cloned: agentrl.Run, tmp_path: Path) -> None:
    own = cloned.folder / "base"
    warm = load_file(cloned.folder / "checkpoints/warm_start-000002/weights.safetensors")
    said = json.loads((cloned.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert said == str(own.resolve())
    found = find_policy(cloned.folder)
    assert found is not None
    torch.testing.assert_close(
        peft_logits(own, cloned.adapter), own_logits(load_saved(found)[0]), rtol=0, atol=1e-5
    )
    held = load_file(own / "model.safetensors")
    assert len(held.keys() & warm.keys()) > 10
    assert all(held[name].equal(warm[name]) for name in held.keys() & warm.keys())

    run = tmp_path / "tiny"
    shutil.copytree(cloned.folder, run)
    shutil.rmtree(checkpoints(run / "checkpoints")[-1])
    shutil.rmtree(run / "adapter")
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    agentrl.resume(run, quiet=True)
    one, other = (path / "adapter/adapter_model.safetensors" for path in (run, cloned.folder))
    assert one.read_bytes() == other.read_bytes()
    shutil.rmtree(lost / "base")
    for work in (agentrl.evaluate, agentrl.resume):
        with pytest.raises(CheckpointError, match=r"lost/base"):
            work(str(lost))


def test_merged_weights_are_exported_of_the_end_and_of_a_checkpoint(
    over: agentrl.Run, base: Path, tmp_path: Path
) -> None:
    export(str(over.folder), tmp_path / "merged", merge=True)
    found = find_policy(over.folder)
    assert found is not None
    exported = load_policy(tmp_path / "merged")[0]
    assert own_logits(exported).equal(own_logits(load_saved(found)[0]))
    export(str(over.folder), tmp_path / "adapter", checkpoint="2")
    early = find_policy(over.folder / "checkpoints" / "train-000002")
    assert early is not None
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "adapter"), own_logits(load_saved(early)[0]), rtol=0, atol=1e-5
    )
    before, after = load_policy(base)[0].state_dict(), exported.state_dict()
    changed = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert changed == {"q_proj", "down_proj"}


def test_cloned_adapters_and_then_others_each_have_their_base(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    run = trained(tmp_path / "whole", *LORA, *CLONED_LORA, "trainer.keep_checkpoints=null")
    early = agentrl.evaluate(run.folder / "checkpoints" / "warm_start-000002", temperature=0.0)
    assert early.checkpoint == "warm_start-000002"
    copied = tmp_path / "tiny"
    shutil.copytree(run.folder, copied)
    for path in checkpoints(copied / "checkpoints")[2:]:
        shutil.rmtree(path)
    for name in ("adapter", "base"):
        shutil.rmtree(copied / name)
    agentrl.resume(copied, quiet=True)
    one, other = (path / "adapter/adapter_model.safetensors" for path in (copied, run.folder))
    assert one.read_bytes() == other.read_bytes()


def test_sharded_adapters_and_sharded_weights_are_resumed_evaluated_and_exported(
    examples: dict[str, ModuleType], base: Path, tmp_path: Path
) -> None:
    sharded = (
        *("learner.backend=fsdp", "learner.optimizer=adamw", f"policy.path={base}", "warm_start.steps=0"),
        "trainer.keep_checkpoints=null",
    )
    try:
        adapted = trained(tmp_path / "adapted", *LORA, *sharded)
        whole = trained(tmp_path / "whole", *sharded)
        for run, what in ((adapted, "adapter/adapter_model"), (whole, "model/model")):
            newest = checkpoints(run.checkpoints)[-1]
            frozen = [name for name, _ in stored_shards(newest / "shards") if "embed" in name]
            assert bool(frozen) is (run is whole)
            shared = [path.stat().st_ino for path in run.checkpoints.glob("*/reference/*.distcp")]
            assert len(shared) == (3 if run is whole else 0)
            assert len(set(shared)) <= 1
            by_end = agentrl.evaluate(run, temperature=0.0)
            by_checkpoint = agentrl.evaluate(newest, temperature=0.0)
            assert by_checkpoint == replace(by_end, checkpoint="train-000003")
            copied = tmp_path / what.partition("/")[0] / "copied"
            shutil.copytree(run.folder, copied)
            shutil.rmtree(copied / "checkpoints" / newest.name)
            shutil.rmtree(copied / what.partition("/")[0])
            agentrl.resume(copied, quiet=True)
            one, other = (folder / f"{what}.safetensors" for folder in (copied, run.folder))
            assert one.read_bytes() == other.read_bytes()
        torch.testing.assert_close(
            peft_logits(base, adapted.adapter),
            own_logits(load_saved(SavedPolicy(adapted))[0]),
            rtol=0,
            atol=1e-5,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # that of one process, which FSDP2 needed


def test_a_checkpoint_of_an_older_version_with_its_frozen_weights_is_resumed(
    cloned: agentrl.Run, tmp_path: Path
) -> None:
    """It held every weight, the adapted ones as `base_layer`, and the reference in learner.pt."""
    run = tmp_path / "tiny"
    shutil.copytree(cloned.folder, run)
    shutil.rmtree(checkpoints(run / "checkpoints")[-1])
    newest = checkpoints(run / "checkpoints")[-1]
    base = load_file(run / "base" / "model.safetensors")
    adapter = load_file(newest / "adapter" / "adapter_model.safetensors")
    names = {"lm_head.weight": "model.embed_tokens.weight"}
    layers = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in adapter}
    old = {}
    for name, values in base.items():
        layer, _, kind = names.get(name, name).rpartition(".")
        old[f"{layer}.base_layer.{kind}" if layer in layers else f"{layer}.{kind}"] = values
    for name, values in adapter.items():
        old[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")] = values
    plain, _ = load_policy(run / "base")
    state = torch.load(newest / "learner.pt", weights_only=True)
    torch.save(state | {"reference": plain.state_dict()}, newest / "learner.pt")
    save_file(old, newest / "weights.safetensors", metadata={"lm_head.weight": "model.embed_tokens.weight"})
    shutil.rmtree(newest / "adapter")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "base")
    hashes = dict.fromkeys(("learner.pt", "weights.safetensors", "progress.json"), "")
    (newest / "hashes.json").write_text(json.dumps(hashes))
    for name in hashes:
        sign(newest, name)
    agentrl.resume(run, quiet=True)
    one, other = (path / "adapter/adapter_model.safetensors" for path in (run, cloned.folder))
    assert one.read_bytes() == other.read_bytes()
    held, first = (load_file(path / "base/model.safetensors") for path in (run, cloned.folder))
    assert all(held[name].equal(first[name]) for name in first)
