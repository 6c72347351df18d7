"""Models, requests and the plain forward that the tests of vLLM compare with."""

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.learn.lora import blank_adapter, merge_adapters
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter, Engine, Generation, GenerationRequest, SamplingParams
from agentrl.policy.model import build_model, hidden_states, output_weight
from agentrl.policy.settings import Device, PolicyConfig
from agentrl.policy.thinking import Ending, Thinking
from agentrl.policy.tokens import fit_tokenizer

STOP = 4
MENU = (
    (20, 21, 22, STOP),
    (20, 21, 23, 24, STOP),
    (20, 30, STOP),
    (20, 41, 42, 43, STOP),
    (20, 41, 42, 44, STOP),
)
# Thoughts end in "!", which every sixth id says; some of those say more.
ENDING = Ending("!", {**dict.fromkeys(range(100, 140), "!"), **dict.fromkeys(range(140, 150), "!\n")})
THINKING = Thinking((), ENDING, (100,), {"": (8, 9), "\n": (9,)})
CONTEXT = 256
LORA = LoraConfig(rank=3, alpha=6.0)
DEVICE: Device = "cpu"

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm"
)


def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["You see a mug 1, a mug 2 and a desk 1.", "take mug 1 from desk 1", "go to shelf 1"] * 4
    return fit_tokenizer(texts, 320)


def policy(
    seed: int = 0, *, dtype: str = "float32", hidden_size: int = 64, initial_std: float = 0.15
) -> PreTrainedModel:
    """Build two layers of two heads, confident enough in their tokens for a mistake to show."""
    config = PolicyConfig(
        device=DEVICE,
        max_context=CONTEXT,
        initial_std=initial_std,
        hidden_size=hidden_size,
        dtype=dtype,  # type: ignore[arg-type]
    )
    return build_model(config, tokenizer(), seed)


def request(
    sequence: str,
    prompt: Sequence[int],
    *,
    new_sequence: bool = True,
    choices: tuple[tuple[int, ...], ...] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    max_tokens: int = 12,
    thinking: Thinking | None = None,
) -> GenerationRequest:
    return GenerationRequest(
        sequence,
        tuple(prompt),
        new_sequence,
        choices,
        seed,
        SamplingParams(temperature, max_tokens),
        thinking=thinking,
    )


def finish(engine: Engine, *requests: GenerationRequest) -> dict[str, Generation]:
    for each in requests:
        engine.submit(each)
    return collected(engine, len(requests))


def collected(engine: Engine, count: int) -> dict[str, Generation]:
    """Return the next replies that finish."""
    done: dict[str, Generation] = {}
    for _ in range(3000):
        done.update((generation.sequence, generation) for generation in engine.step())
        if len(done) == count:
            return done
    raise AssertionError(f"only {sorted(done)} finished, wanted {count}")


def several(
    prefix: str,
    choices: tuple[tuple[int, ...], ...] | None,
    temperature: float,
    thinking: Thinking | None = None,
) -> list[GenerationRequest]:
    """Prompts of several lengths, some over a block of vLLM's cache."""
    return [
        request(
            f"{prefix}{seed}",
            [5 + (7 * place) % 280 for place in range(3 + 29 * seed)],
            seed=seed,
            choices=choices,
            temperature=temperature,
            max_tokens=24,
            thinking=thinking,
        )
        for seed in range(8)
    ]


@torch.inference_mode()
def plain(
    model: PreTrainedModel, before: Sequence[int], reply: Generation, temperature: float = 1.0
) -> tuple[list[float], list[float]]:
    """Logprobs and entropies of a reply's tokens by one forward over all of it."""
    ids = [*before, *reply.token_ids]
    hidden = hidden_states(model, torch.tensor(ids), torch.tensor([len(ids)]))
    logits = (hidden @ output_weight(model).T)[len(before) - 1 : -1].double() / temperature
    logprobs, entropies = [], []
    for place, token in enumerate(reply.token_ids):
        allowed = None if reply.allowed is None else reply.allowed[place]
        allowed = range(logits.shape[1]) if allowed is None else allowed
        row = logits[place][list(allowed)].log_softmax(-1)
        logprobs.append(row[list(allowed).index(token)].item())
        entropies.append(-(row.exp() * row).sum().item())
    return logprobs, entropies


def furthest(
    model: PreTrainedModel,
    requests: Sequence[GenerationRequest],
    replies: dict[str, Generation],
    temperature: float = 1.0,
) -> tuple[float, float]:
    """The largest differences from the plain forward, of a logprob and of an entropy."""
    worst = [0.0, 0.0]
    for each in requests:
        reply = replies[each.sequence]
        assert reply.error is None
        found = plain(model, each.prompt_ids, reply, temperature)
        for kind, (ours, theirs) in enumerate(zip(found, (reply.logprobs, reply.entropies), strict=True)):
            assert len(theirs) == len(reply.token_ids)
            worst[kind] = max([worst[kind], *map(lambda a, b: abs(a - b), ours, theirs)])
    return worst[0], worst[1]


def thoughtful(engine: Engine, model: PreTrainedModel, context: int = CONTEXT) -> None:
    """Check replies that reason freely and then choose against a plain forward pass."""
    asked = [each for each in several("t", MENU, 1.0, THINKING) if len(each.prompt_ids) < context - 60]
    replies = finish(engine, *asked)
    assert max(furthest(model, asked, replies)) < 1e-3
    forms, lengths = set(), set()
    for reply in replies.values():
        assert reply.allowed is not None
        free = sum(ids is None for ids in reply.allowed)
        assert None not in reply.allowed[free:]
        written = next(
            form for form in ((8, 9), (9,), (100, 8, 9)) if reply.token_ids[free:][len(form) :] in MENU
        )
        assert not ENDING.pieces.keys() & set(reply.token_ids[: free - 1])
        assert (reply.token_ids[free - 1] in ENDING.pieces) == (written != (100, 8, 9))
        forms.add(written)
        lengths.add(free)
    assert len(lengths) > 3
    assert len(forms) > 1
    # The next turn follows the reasoning and the choice.
    first = asked[2]
    second = request(first.sequence, (9, 8), new_sequence=False, seed=9, choices=MENU, thinking=THINKING)
    before = [*first.prompt_ids, *replies[first.sequence].token_ids, 9, 8]
    found = finish(engine, second)[first.sequence]
    assert found.logprobs == pytest.approx(plain(model, before, found)[0], abs=1e-3)
    again = finish(engine, *(replace(each, sequence=f"again-{each.sequence}") for each in asked))
    assert {name.removeprefix("again-"): each.token_ids for name, each in again.items()} == {
        name: each.token_ids for name, each in replies.items()
    }
    for name in (*replies, *again):
        engine.release(name)


def apart(
    engine: Engine, model: PreTrainedModel, kind: str, choices: Any, temperature: float
) -> tuple[float, float]:
    """`furthest` of several requests, printed."""
    asked = several(kind, choices, temperature)
    found = furthest(model, asked, finish(engine, *asked), temperature)
    dtype = next(model.parameters()).dtype
    print(f"vLLM and a plain forward, {kind}, {dtype}: {found[0]:.2g} (logprobs), {found[1]:.2g} (entropies)")
    for each in asked:
        engine.release(each.sequence)
    return found


def random_adapter(model: PreTrainedModel, seed: int, config: LoraConfig = LORA) -> Adapter:
    """Adapters that move logprobs by tenths of a nat and more."""
    draw, blank = torch.Generator().manual_seed(seed), blank_adapter(model, config)
    dtype = next(model.parameters()).dtype
    weights = {
        name: (0.15 * torch.randn(value.shape, generator=draw)).to(dtype)
        for name, value in blank.weights.items()
    }
    return replace(blank, weights=weights)


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of the model with an adapter in its weights, for a plain forward."""
    copied = copy.deepcopy(model)
    merge_adapters(copied, adapter.weights, adapter.alpha / adapter.rank)
    return copied
