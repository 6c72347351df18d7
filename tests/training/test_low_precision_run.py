"""Runs whose engine rounds weights, and runs that meet what is no number."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_trainer import TINY, interrupt_at, rows, same_results
from transformers import LlamaConfig, LlamaForCausalLM

import agentrl
from agentrl.errors import CheckpointError, ConfigError, NonFiniteError
from agentrl.learn.learner import Learner
from agentrl.learn.sharding import stored_shards
from agentrl.policy.model import load_policy, save_policy
from agentrl.policy.precision import non_finite
from agentrl.policy.tokens import fit_tokenizer
from agentrl.run.checkpoint import latest_finite
from agentrl.run.signals import RunInterrupted
from agentrl.run.weights import export
from agentrl.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("undrawn")

ALL_TEACH = "algorithm.drop_equal_groups=false"
QUICK = (*TINY, "evaluation.baselines=[]", "evaluation.tasks=2", "trainer.checkpoint_every=2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["higher", "lower", "say a number", "guess a number from 1 to 15"]
    tokenizer: Any = fit_tokenizer(texts * 4, 300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.1,
            max_position_embeddings=1024,
        )
    )
    folder = tmp_path_factory.mktemp("llama") / "model"
    save_policy(model, tokenizer, folder)
    return folder


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *QUICK, f"run.folder={folder}", "run.name=tiny", *more)


def trained(folder: Path, *more: str) -> agentrl.Run:
    return agentrl.train(config(folder, *more), quiet=True)


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return dict(load_file(folder / name))


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Share of the weights of the layers' matrices; of a table of tokens, many rows were never read."""
    assert before.keys() == after.keys()
    matrices = [name for name, value in before.items() if ".layers." in name and value.dim() == 2]
    changed = sum(int((before[name] != after[name]).sum()) for name in matrices)
    return changed / sum(before[name].numel() for name in matrices)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_moves_as_many_weights_beside_an_engine_that_rounds_them(
    optimizer: str, llama: Path, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    before, shares = weights(llama), {}
    for dtype in ("float32", "bfloat16", "float16"):
        run = trained(
            tmp_path / dtype,
            f"policy.path={llama}",
            f"policy.dtype={dtype}",
            "warm_start.steps=1",
            "trainer.steps=0",
            f"warm_start.learner.optimizer={optimizer}",
            "warm_start.learner.learning_rate=1e-6",
            "warm_start.learner.matrix_learning_rate=1e-6",
            "warm_start.learner.weight_decay=0",
            "warm_start.learner.warmup_steps=0",
        )
        after = weights(run.model)
        assert {value.dtype for value in after.values()} == {torch.float32}
        shares[dtype] = moved(before, after)
        assert rows(run.folder)[0]["warm_start/learner/updates"] == 1
    assert shares["float32"] > 0.9
    assert shares["bfloat16"] >= 0.95 * shares["float32"]
    assert shares["float16"] >= 0.95 * shares["float32"]


def test_the_engine_generates_with_the_weights_of_now_rounded(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    refresh_engine = TrainingState.refresh_engine

    def watching(self: TrainingState) -> None:
        refresh_engine(self)
        served = self._session.policy.served
        assert served is not self.learner.policy
        learned = dict(self.learner.policy.named_parameters())
        for name, value in served.named_parameters():
            assert value.dtype == torch.bfloat16
            assert torch.equal(learned[name].detach().bfloat16(), value.detach())
        seen.append(self.learner.config.compute_dtype == "bfloat16")

    monkeypatch.setattr(TrainingState, "refresh_engine", watching)
    run = trained(tmp_path, "policy.dtype=bfloat16")
    assert seen == [True] * 7  # at first, cloned, with the next learner, and after each of four steps
    gaps = [row["train/algorithm/mismatch/max"] for row in rows(run.folder)[4:]]
    assert 1e-5 < max(gaps) < 0.2


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="sync"),
        pytest.param(("trainer.mode=async", "trainer.max_staleness=0"), id="async", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_in_bfloat16_equals_one_that_never_stopped(
    more: tuple[str, ...], examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = ("policy.dtype=bfloat16", "trainer.checkpoint_every=3", *more)
    unbroken = trained(tmp_path / "one", *low)
    broken = tmp_path / "two" / "tiny"
    with monkeypatch.context() as patch:
        interrupt_at("warm_start", 2, patch)
        with pytest.raises(RunInterrupted):
            trained(tmp_path / "two", *low)
    with monkeypatch.context() as patch:
        interrupt_at("train", 2, patch)
        with pytest.raises(RunInterrupted):
            agentrl.resume(broken, quiet=True)
    agentrl.resume(broken, quiet=True)
    same_results(unbroken.folder, broken)


def test_adapters_learn_beside_an_engine_that_rounds_and_leave_a_model_in_float32(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
    adapted = ("policy.dtype=bfloat16", "learner.lora.rank=2", "learner.lora.targets=[q_proj]")
    before = weights(trained(tmp_path / "cloned", "policy.dtype=bfloat16", "trainer.steps=0").model)
    run = trained(tmp_path / "adapted", *adapted, "algorithm.drop_equal_groups=false")
    export(str(run.folder), tmp_path / "merged", merge=True)
    after = weights(tmp_path / "merged")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name.split(".", 4)[-1] for name in changed} == {"q_proj.weight"}
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_a_checkpoint_of_weights_in_bfloat16_is_taken_up_in_float32(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    """As runs wrote them when the learner's weights were those of the engine."""
    run = trained(tmp_path, "policy.dtype=bfloat16").folder
    shutil.rmtree(run / "model")
    old = run / "checkpoints" / "train-000002"
    shutil.rmtree(run / "checkpoints" / "train-000004")
    rewrite(old, lambda values: values.bfloat16())
    state = torch.load(old / "learner.pt", weights_only=True)
    for each in state["optimizers"]:
        for states in each["state"].values():
            states.update({key: value.bfloat16() for key, value in states.items() if key != "step"})
    torch.save(state, old / "learner.pt")
    sign(old)
    agentrl.resume(run, quiet=True)
    assert {value.dtype for value in weights(run / "model").values()} == {torch.float32}
    held = torch.load(run / "checkpoints" / "train-000004" / "learner.pt", weights_only=True)["optimizers"]
    states = [value for each in held for states in each["state"].values() for value in states.values()]
    assert {value.dtype for value in states} == {torch.float32}


# What is not finite


def rewrite(checkpoint: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = checkpoint / "weights.safetensors"
    save_file({name: change(values) for name, values in load_file(file).items()}, file)
    sign(checkpoint)


def sign(checkpoint: Path) -> None:
    """Write the hashes of what a checkpoint holds now."""
    known = json.loads((checkpoint / "hashes.json").read_text())
    fresh = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in known}
    (checkpoint / "hashes.json").write_text(json.dumps(fresh))


def poison(checkpoint: Path, where: str) -> str:
    """Put an inf into a checkpoint; the name of what holds it."""
    if where == "weights":
        name = "model.norm.weight"
        file = checkpoint / "weights.safetensors"
        tensors = load_file(file)
        tensors[name][3] = math.inf
        save_file(tensors, file)
    else:
        state = torch.load(checkpoint / "learner.pt", weights_only=True)
        state["optimizers"][1]["state"][0]["momentum_buffer"][0, 0] = math.nan
        name = "optimizers.1.state.0.momentum_buffer"
        torch.save(state, checkpoint / "learner.pt")
    sign(checkpoint)
    return name


@pytest.fixture(scope="module")
def finished(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trained(tmp_path_factory.mktemp("finished"), "trainer.checkpoint_every=1").folder
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    return run


@pytest.mark.parametrize("where", ["weights", "states"])
def test_a_checkpoint_that_is_not_finite_is_no_place_to_go_on_from(
    where: str, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "tiny"))
    newest, older = (run / "checkpoints" / f"train-00000{step}" for step in (4, 3))
    name = poison(newest, where)
    with pytest.raises(CheckpointError, match=rf"train-000004: nan or inf is in {name}; the newest"):
        agentrl.resume(run, quiet=True)
    with pytest.raises(CheckpointError, match=r"newest finite checkpoint is train-000003\. Remove the newer"):
        agentrl.resume(run, quiet=True)
    poison(older, where)
    others = [path for path in (run / "checkpoints").iterdir() if path not in (newest, older)]
    for path in others:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no checkpoint there is finite: start a new run"):
        agentrl.resume(run, quiet=True)
    shutil.rmtree(newest)
    for path in (older, *others):
        shutil.copytree(finished / "checkpoints" / path.name, path, dirs_exist_ok=True)
    agentrl.resume(run, quiet=True)
    same_results(finished, run)


def test_weights_that_are_dealt_out_are_learned_in_float32_too_and_their_checkpoints_are_read(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    sharded = ("policy.dtype=bfloat16", "learner.backend=fsdp", "warm_start.steps=1", "trainer.steps=1")
    try:
        run = trained(tmp_path, *sharded, ALL_TEACH).folder
        kept = weights(run / "model")
        assert {value.dtype for value in kept.values()} == {torch.float32}
        newest = run / "checkpoints" / "train-000001"
        for name, value in stored_shards(newest / "shards"):
            if name.startswith("learned.policy."):
                assert torch.equal(value, kept[name.removeprefix("learned.policy.")])
        part = next((newest / "shards").glob("*.distcp"))
        known = kept["model.norm.weight"].numpy().tobytes()
        content = part.read_bytes()
        assert content.count(known) == 1
        part.write_bytes(content.replace(known, b"\x00\x00\xc0\x7f" + known[4:]))  # a float32 nan
        sign(newest)
        with pytest.raises(
            CheckpointError, match=r"nan or inf is in learned.policy.model.norm.weight; .* warm_s"
        ):
            agentrl.resume(run, quiet=True)
    finally:
        dist.destroy_process_group()


def spoil_at(
    stage: str, step: int, patch: pytest.MonkeyPatch, *, told: bool, value: float = math.inf
) -> None:
    """Have an optimiser step lose a weight to a value; `told`: after it was looked at, and so unnoticed."""
    update = Learner.update

    def spoiling(self: Learner, batch: Any, algorithm: Any, context: Any) -> dict[str, float]:
        weight = dict(self.policy.named_parameters())["model.norm.weight"]

        def spoil(*_: object) -> None:
            weight.data[0] = value

        at = self.config.weight_decay > 0, context.step  # which cloning alone has
        if at != (stage == "warm_start", step - 1):
            return update(self, batch, algorithm, context)
        if told:
            found = update(self, batch, algorithm, context)
            spoil()
            return found
        for optimizer in self._state.optimizers:
            optimizer.register_step_post_hook(spoil)
        return update(self, batch, algorithm, context)

    patch.setattr(Learner, "update", spoiling)


def test_weights_that_an_update_lost_are_not_kept_and_a_good_step_is_named(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", ALL_TEACH)
    with monkeypatch.context() as patch:
        spoil_at("train", 4, patch, told=False)
        with pytest.raises(NonFiniteError) as stopped:
            trained(tmp_path / "lost", ALL_TEACH)
    run = tmp_path / "lost" / "tiny"
    complaint = str(stopped.value)
    assert complaint.startswith(
        "train step 4: an optimiser step whose loss and gradient were finite left nan"
    )
    assert complaint.endswith(f"--resume {run}, from train-000002, the newest checkpoint that is finite")
    assert all_finite(run)
    agentrl.resume(run, quiet=True)
    same_results(whole.folder, run)


def test_cloning_that_loses_its_weights_at_once_leaves_nothing_to_go_on_from(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_at("warm_start", 1, monkeypatch, told=False)
    with pytest.raises(
        NonFiniteError, match=r"warm_start step 1: .*\n.* has no checkpoint that is finite; start"
    ):
        trained(tmp_path)
    assert list((tmp_path / "tiny" / "checkpoints").glob("*")) == []


def test_no_way_of_saving_keeps_what_nobody_noticed(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil_at("train", 4, patch, told=True)
        with pytest.raises(
            NonFiniteError, match=r"train-000004: not written, because nan or inf is in model\.norm"
        ):
            trained(tmp_path / "saved", ALL_TEACH)
    with monkeypatch.context() as patch:
        spoil_at("train", 3, patch, told=True)
        interrupt_at("train", 3, patch)
        with pytest.raises(RunInterrupted, match="from train-000002, the newest checkpoint that is finite"):
            trained(tmp_path / "stopped", ALL_TEACH)
    for name in ("saved", "stopped"):
        assert all_finite(tmp_path / name / "tiny")
        assert not (tmp_path / name / "tiny" / "model").exists()


def all_finite(run: Path) -> bool:
    found = list((run / "checkpoints").glob("*/weights.safetensors"))
    return found != [] and not any(non_finite(load_file(file).items()) for file in found)


def test_a_model_folder_that_is_not_finite_is_not_written(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(llama, device="cpu")
    save_policy(model, tokenizer, tmp_path / "model")
    with torch.no_grad():
        dict(model.named_parameters())["model.norm.weight"][0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model: not saved, since model.norm.weight holds nan or inf"):
        save_policy(model, tokenizer, tmp_path / "model")
    assert weights(tmp_path / "model").keys() == weights(llama).keys()
    assert moved(weights(tmp_path / "model"), weights(llama)) == 0.0


def test_weights_beyond_the_engine_s_numbers_stop_the_run_and_are_kept(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_at("train", 3, monkeypatch, told=True, value=1e5)
    with pytest.raises(NonFiniteError) as stopped:
        trained(tmp_path, "policy.dtype=float16", ALL_TEACH)
    run = tmp_path / "tiny"
    assert "policy.dtype=float16 cannot hold model.norm.weight: weights that are finite" in str(stopped.value)
    assert "are beyond 6.55e+04; set policy.dtype=float32" in str(stopped.value)
    assert str(stopped.value).endswith(f"continue with: agentrl train --resume {run}")
    newest = latest_finite(run / "checkpoints")
    assert newest is not None
    assert newest.name == "train-000003"
    assert weights(newest, "weights.safetensors")["model.norm.weight"][0] == 1e5


@pytest.mark.parametrize(("rate", "lines"), [("1e-20", 1), ("1e-4", 0)])
def test_updates_that_are_rounded_away_are_told_once(
    rate: str,
    lines: int,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("learning_rate", "matrix_learning_rate")
    run = agentrl.train(config(tmp_path, ALL_TEACH, *(f"learner.{name}={rate}" for name in names)))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("of the weights that had a gradient") == lines
    assert told.count("raise learner.learning_rate and .matrix_learning_rate") == lines
    shares = [row[f"{row['stage']}/learner/weights_moved"] for row in rows(run.folder)]
    assert len(shares) == 8
    assert all((share < 0.2) == bool(lines) for share in shares[4:])
    assert min(shares[:4]) > 0.9


def test_a_rate_of_cloning_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"warm_start\.learner\.learning_rate: .*got inf, wanted above 0 and at most 1e\+30"
    ):
        config(tmp_path, "warm_start.learner.learning_rate=.inf")
    assert list(tmp_path.iterdir()) == []
