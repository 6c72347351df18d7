"""How fast the quickstart's policy and a 0.5B-shaped one learn on this machine's GPU, beside full logits.

Needs torch and transformers alone, and no weights: PYTHONPATH=. python scripts/bench_gpu.py

Both contenders compute the log-probability and entropy of every token of the same sequences with the same
random weights in bfloat16, the gradient of a loss of both, and an optimiser step. Ours is what the learner
calls: a packed forward pass, then logits of a chunk of tokens at a time. The rival is what one would write:
the model's own forward pass with all logits at once. The sequences are equally long, which suits the rival:
it has no padding. They take turns, and the median of the pairs counts.

Model FLOPs are those of a forward and a backward pass without anything computed twice, attention causal;
their utilisation is the share of the device's dense bfloat16 peak, and is left out where that is not known.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from agentrl.learn.fused import token_statistics
from agentrl.learn.optimizer import build_optimizers
from agentrl.learn.settings import LearnerConfig
from agentrl.policy.attention import PACKED
from agentrl.policy.model import hidden_states, output_weight

SHAPES = {
    "quickstart": Qwen2Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
}
# The steps are small: the weights shall stay as they are.
LEARNERS = {
    "quickstart": LearnerConfig(optimizer="muon", learning_rate=1e-6, matrix_learning_rate=1e-6),
    "0.5B": LearnerConfig(optimizer="adamw", learning_rate=1e-6),
}

# Dense bfloat16, as the vendor's data sheets say, by the name that torch gives the device.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}

Statistics = tuple[Tensor, Tensor]
Contender = Callable[[PreTrainedModel, Tensor], Statistics]


@dataclass(frozen=True)
class Pass:
    """One optimiser step: seconds, and bytes at the highest point where the device counts them."""

    seconds: float
    peak: int | None


def ours(model: PreTrainedModel, tokens: Tensor) -> Statistics:
    """Log-probability and entropy of all tokens but each row's first, as the learner computes them."""
    rows, length = tokens.shape
    hidden = hidden_states(model, tokens.flatten(), torch.full((rows,), length))
    states = hidden.view(rows, length, -1)[:, :-1].flatten(0, 1)
    return token_statistics(states, output_weight(model), tokens[:, 1:].flatten())


def rival(model: PreTrainedModel, tokens: Tensor) -> Statistics:
    """Return the same from full logits."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    logprobs = logits.float().log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens[:, 1:].reshape(-1, 1)).squeeze(1), entropies


def step(contender: Contender, model: PreTrainedModel, tokens: Tensor) -> None:
    """Leave a policy gradient with an entropy bonus in the parameters; the advantages are made up."""
    logprobs, entropies = contender(model, tokens)
    advantages = torch.linspace(-1, 1, len(logprobs), device=logprobs.device)
    loss = -(advantages * logprobs).mean() - 0.01 * entropies.mean()
    loss.backward()


def training_flops(config: Qwen2Config, tokens: int, context: float) -> float:
    """Model FLOPs of a forward and a backward pass.

        3 * tokens * (2 * matrix parameters of the layers + 2 * V d + 4 * layers * width * context)

    Args:
        config: of the model.
        tokens: that go through it, each predicting one.
        context: keys that a token attends to, on average.
    """
    head = config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    matrices = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    layers = config.num_hidden_layers * (2 * matrices + 4 * queries * context)
    return 3 * tokens * (layers + 2 * config.vocab_size * config.hidden_size)


def timed(
    contender: Contender, model: PreTrainedModel, tokens: Tensor, optimizers: Sequence[Optimizer]
) -> Pass | None:
    """One optimiser step; None when the device has not enough memory for it."""
    cuda = tokens.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        step(contender, model, tokens)
        for optimizer in optimizers:
            optimizer.step()
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    return Pass(time.perf_counter() - began, torch.cuda.max_memory_allocated() if cuda else None)


def largest_difference(model: PreTrainedModel, tokens: Tensor) -> Statistics:
    """Of the log-probabilities and of the entropies, in nats, on the first two rows."""
    with torch.no_grad():
        pairs = zip(ours(model, tokens[:2]), rival(model, tokens[:2]), strict=True)
        logprobs, entropies = ((mine - its).abs().max() for mine, its in pairs)
    return logprobs, entropies


def built(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(SHAPES[shape]).to(dtype)
    model.set_attn_implementation(PACKED)
    return model


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="this one alone")
    parser.add_argument("--sequences", type=int, help="4 unless told, 2 with --cpu")
    parser.add_argument("--tokens", type=int, help="of each sequence; 2048 unless told, 128 with --cpu")
    parser.add_argument("--pairs", type=int, help="5 unless told, 2 with --cpu")
    parser.add_argument("--cpu", action="store_true", help="only try it out: the quickstart's shape, small")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.exit(1, "no GPU: torch finds none here, so nothing was measured; --cpu tries it out\n")
    device = "cpu" if args.cpu else "cuda"
    sequences, tokens, pairs = (2, 128, 2) if args.cpu else (4, 2048, 5)
    name = "cpu" if args.cpu else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    every = ["quickstart"] if args.cpu else list(SHAPES)
    for shape in [args.shape] if args.shape else every:
        compare(shape, device, args.sequences or sequences, args.tokens or tokens, args.pairs or pairs)
    if name not in PEAK_FLOPS:
        print(f"no utilisation: the dense bfloat16 peak of {name} is not in the table")


def compare(shape: str, device: str, sequences: int, length: int, pairs: int) -> None:
    """Print the table of a shape."""
    model = built(shape, device, torch.bfloat16)
    tokens = torch.randint(model.config.vocab_size, (sequences, length), device=device)
    optimizers = build_optimizers(model, LEARNERS[shape])
    contenders: dict[str, Contender] = {"agentrl": ours, "full logits": rival}
    for contender in contenders.values():
        timed(contender, model, tokens, optimizers)  # warms up
    found: dict[str, list[Pass | None]] = {name: [] for name in contenders}
    for _ in range(pairs):
        for name, contender in contenders.items():
            found[name].append(timed(contender, model, tokens, optimizers))
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name()) if device == "cuda" else None
    flops = training_flops(model.config, tokens.numel(), (length + 1) / 2)
    print(
        f"{shape} ({model.num_parameters():,} parameters, bfloat16, {LEARNERS[shape].optimizer}), "
        f"{sequences} sequences of {length} tokens, {flops / 1e12:.3g} model TFLOP a step, median of {pairs}"
    )
    print(f"{'':16}{'tokens/s':>12}{'peak GB':>10}{'model FLOPs utilisation':>26}")
    for name, passes in found.items():
        print(f"{name:16}{described(passes, tokens.numel(), flops, peak)}")
    print(ratios(found))
    logprobs, entropies = largest_difference(model, tokens)
    print(f"largest difference of a logprob {logprobs:.2g} nats, of an entropy {entropies:.2g} nats")


def described(passes: list[Pass | None], tokens: int, flops: float, peak: float | None) -> str:
    """Return a contender's medians."""
    done = [each for each in passes if each is not None]
    if len(done) < len(passes):
        return f"{'out of memory':>22}"
    seconds = statistics.median(each.seconds for each in done)
    highest = max((each.peak for each in done if each.peak is not None), default=None)
    memory = "-" if highest is None else f"{highest / 1e9:.2f}"
    utilisation = "-" if peak is None else f"{flops / seconds / peak:.1%}"
    return f"{tokens / seconds:12,.0f}{memory:>10}{utilisation:>26}"


def ratios(found: dict[str, list[Pass | None]]) -> str:
    """Return the pairs, each against its own rival."""
    pairs = [(mine, its) for mine, its in zip(*found.values(), strict=True) if mine and its]
    if not pairs:
        return "no pair to compare"
    times = [its.seconds / mine.seconds for mine, its in pairs]
    text = f"speed {statistics.median(times):.2f} times the rival's ({min(times):.2f} to {max(times):.2f})"
    bytes_ = [mine.peak / its.peak for mine, its in pairs if mine.peak and its.peak]
    return text + (f", peak memory {statistics.median(bytes_):.2f} times" if bytes_ else "")


if __name__ == "__main__":
    main()
