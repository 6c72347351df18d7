"""The `policy` block of a configuration; loads no torch."""

from dataclasses import dataclass, field
from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
ReplyFormat = Literal["plain", "action_tags", "think_action"]


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Which policy acts: a Hugging Face folder, or a small decoder with random weights.

    Args:
        path: folder of a causal language model with its tokenizer; None builds one from the sizes below.
        hidden_size: width d of the residual stream; the MLP is 3 d wide.
        layers: number of decoder layers.
        heads: attention heads; heads of 32 (d / 32 of them) learned best at this size.
        initial_std: of new weights; at this width 0.1 learns in fewer steps than the usual 0.02.
        vocab_size: asked of the tokenizer that is fitted on environment text; a small corpus yields fewer.
        max_context: tokens that one sequence may hold.
        device: auto takes cuda where there is one, else the cpu.
        dtype: of the weights.
        reply: what a reply looks like; a format with tags needs a tokenizer with a chat template.
        max_observation_tokens: an observation is cut after so many tokens.
        tokenizer_episodes: random episodes of training tasks whose text a new tokenizer is fitted on.
    """

    path: str | None = None
    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    initial_std: float = 0.1
    vocab_size: int = 1024
    max_context: int = 1024
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    reply: ReplyFormat = "plain"
    max_observation_tokens: int = 96
    tokenizer_episodes: int = 200


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Of the engine `vllm`.

    Args:
        url: of a server that is already running, "http://host:port"; None starts vLLM in this process.
    """

    url: str | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Who generates, the `engine` block of a configuration.

    Args:
        name: torch keeps the model in this process and returns exact entropies; vllm needs the extra `vllm`.
        max_tokens: limit on a free-form reply.
        actors: Ray actors that generate, each with a copy of the weights; None generates in this process.
        vllm: of the engine `vllm`.
    """

    name: Literal["torch", "vllm"] = "torch"
    max_tokens: int = 64
    actors: int | None = None
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def provides(self) -> frozenset[str]:
        """What components of an algorithm may require of this engine."""
        return frozenset({"rollout:entropy"})
