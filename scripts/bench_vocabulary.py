"""Measure what a vocabulary of 152k costs: the log-probability and entropy head, and a draw beyond its GEMM.

    python scripts/bench_vocabulary.py [--tokens 512 2048] [--pairs 5] [--vocabulary 151936] [--json FILE]

Rivals, in turn with ours: TRL's chunked head (`pip install trl==1.16.0`), each pass in a process of
its own, for its peak memory beyond weights and inputs; for draws, the path in float64 that menus take. CPU
seconds of one thread, medians of the pairs.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agentrl.learn.fused import token_statistics
from agentrl.policy.sampling import _draw_rows, _to_numpy, draw_rows

WIDTH = 896  # of Qwen2.5-0.5B
DRAWS = 64


def head_inputs(vocabulary: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, output weight and targets."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, WIDTH, generator=generator).mul_(0.02).to(dtype).requires_grad_()
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def resident(figure: str) -> int:
    """Return the memory of this process in bytes, now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(figure))


def head_pass(contender: str, vocabulary: int, tokens: int, dtype: str) -> None:
    """Print CPU seconds and peak bytes of a forward and a backward pass, as JSON."""
    hidden, weight, targets = head_inputs(vocabulary, tokens, getattr(torch, dtype))
    if contender == "trl":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def compute() -> tuple[Tensor, Tensor]:
            found = ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",)
            )
            return found[0], found[1]

    else:

        def compute() -> tuple[Tensor, Tensor]:
            return token_statistics(hidden, weight, targets)

    torch.mm(hidden[:8].detach(), weight[:8].detach().T)  # loads the kernels
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.process_time()
    logprobs, entropies = compute()
    (logprobs.mean() + 0.01 * entropies.mean()).backward()
    seconds = time.process_time() - started
    peak = resident("VmHWM") - before
    assert weight.grad is not None
    check = [float(logprobs.detach().mean()), float(entropies.detach().mean()), float(weight.grad.norm())]
    print(json.dumps({"seconds": seconds, "bytes": peak, "check": check}))


def compare_heads(vocabulary: int, tokens: int, pairs: int, dtype: str) -> dict[str, float]:
    """Return the medians of both heads and of their ratios, after checking that they agree."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for _ in range(pairs):
        for contender, found in runs.items():
            command = [sys.executable, __file__, "--head", contender, str(vocabulary), str(tokens), dtype]
            found.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    np.testing.assert_allclose(runs["ours"][0]["check"], runs["trl"][0]["check"], rtol=1e-3)
    result = {}
    for unit in ("seconds", "bytes"):
        ours, theirs = ([run[unit] for run in runs[name]] for name in ("ours", "trl"))
        result[f"ours_{unit}"], result[f"trl_{unit}"] = statistics.median(ours), statistics.median(theirs)
        result[f"{unit}_ratio"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return result


def compare_draws(vocabulary: int, pairs: int) -> dict[str, float]:
    """Return milliseconds per draw of both paths, and the share of equal draws."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(DRAWS, vocabulary, generator=generator)
    logits[:, :20] += 6.0
    uniforms, ones = np.random.default_rng(0).random(DRAWS), np.ones(DRAWS)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(pairs):
        rows = logits.clone().split(1)
        started = time.process_time()
        drawn = [
            int(draw_rows(row, torch.from_numpy(uniforms[k : k + 1]), torch.from_numpy(ones[k : k + 1]))[0])
            for k, row in enumerate(rows)
        ]
        ours.append(time.process_time() - started)
        started = time.process_time()
        wanted = _draw_rows(_to_numpy(logits), uniforms, ones).chosen
        theirs.append(time.process_time() - started)
    return {
        "ours_ms": 1e3 * statistics.median(ours) / DRAWS,
        "float64_ms": 1e3 * statistics.median(theirs) / DRAWS,
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "same": float(np.mean(np.array(drawn) == np.array(wanted))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--head", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.head:
        contender, vocabulary, tokens, dtype = arguments.head
        head_pass(contender, int(vocabulary), int(tokens), dtype)
        return
    results = {f"draw of {arguments.vocabulary}": compare_draws(arguments.vocabulary, arguments.pairs)}
    if importlib.util.find_spec("trl") is None:
        print("heads: not measured, the rival is missing: pip install trl==1.16.0")
    else:
        for dtype in arguments.dtype:
            for tokens in arguments.tokens:
                name = f"head, {tokens} tokens, {dtype}"
                results[name] = compare_heads(arguments.vocabulary, tokens, arguments.pairs, dtype)
    for name, figures in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
