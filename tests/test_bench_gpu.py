"""scripts/bench_gpu.py: both contenders compute the same, FLOPs are those that torch counts, few packages."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agentrl.policy.model import decoder_settings
from agentrl.policy.settings import PolicyConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bench_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(bench: ModuleType, contender: Any) -> list[torch.Tensor]:
    model = bench.built("quickstart", "cpu", torch.float32)
    tokens = torch.randint(1024, (3, 20), generator=torch.Generator().manual_seed(0))
    bench.step(contender, model, tokens)
    return [value.grad for value in model.parameters()]


def test_both_contenders_leave_the_same_gradients(bench: ModuleType) -> None:
    for mine, its in zip(gradients(bench, bench.ours), gradients(bench, bench.rival), strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_model_flops_are_those_that_torch_counts_without_recomputation(bench: ModuleType) -> None:
    model = bench.built("quickstart", "cpu", torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.zeros(2, 16, dtype=torch.int64), use_cache=False).logits
        logits.sum().backward()
    # Torch counts attention as if every token saw all 16.
    assert counter.get_total_flops() == bench.training_flops(model.config, 2 * 16, 16)


def test_the_default_shape_is_that_of_a_05b_model(bench: ModuleType) -> None:
    with torch.device("meta"):
        model = bench.Qwen2ForCausalLM(bench.SHAPES["0.5B"])
    assert model.num_parameters() == 494_032_768


def test_medians_and_ratios_are_of_pairs(bench: ModuleType) -> None:
    mine = [bench.Pass(seconds, 100) for seconds in (1.0, 2.0, 4.0)]
    its = [bench.Pass(seconds, 400) for seconds in (3.0, 2.0, 8.0)]
    assert bench.ratios({"mine": mine, "its": its}) == (
        "speed 2.00 times the rival's (1.00 to 3.00), peak memory 0.25 times"
    )
    assert bench.ratios({"mine": mine, "its": [None] * 3}) == "no pair to compare"
    assert bench.described(its, 30, 9e12, 1e13).split() == ["10", "0.00", "30.0%"]
    assert bench.described([None], 30, 9e12, 1e13).strip() == "out of memory"


def test_a_shape_of_ours_is_that_of_the_quickstart(bench: ModuleType) -> None:
    ours, theirs = bench.SHAPES["quickstart"].to_dict(), decoder_settings(PolicyConfig(), 1024).to_dict()
    named = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert {name: ours[name] for name in named} == {name: theirs[name] for name in named}


def test_without_a_gpu_it_says_so_and_measures_nothing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("no GPU: torch finds none here, so nothing was measured")


def test_it_is_tried_out_on_a_cpu_where_that_is_asked_for(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cpu", "--sequences", "2", "--tokens", "16", "--pairs", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    bench.main()
    said = capsys.readouterr().out
    assert "quickstart (172,736 parameters, bfloat16, muon), 2 sequences of 16 tokens" in said
    assert "no utilisation: the dense bfloat16 peak of cpu is not in the table" in said
    assert "0.5B" not in said


@pytest.mark.slow
def test_it_is_one_command_with_torch_and_transformers_alone() -> None:
    absent = ("gymnasium", "pyarrow", "pydantic", "matplotlib", "scipy", "psutil", "cloudpickle", "rich")
    code = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        f"sys.argv[1:] = '--cpu --tokens 16'.split()\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stderr
    assert "speed " in answer.stdout
