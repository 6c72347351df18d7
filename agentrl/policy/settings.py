"""The `policy` block of a configuration; loads no torch."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from agentrl.config import ContextTokens, Devices, OptionalCount, Processes, Seconds, check_own_numbers
from agentrl.errors import ConfigError

Device = Literal["auto", "cpu", "cuda", "mps"]
ReplyFormat = Literal["plain", "action_tags", "think_action"]

# Parameters with which a chat template is rendered, and names that only its tokenizer gives a value.
_NOT_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Which policy acts: a Hugging Face folder, or a small decoder with random weights.

    Args:
        path: folder of a causal language model with its tokenizer, whose `eos_token_id` in config.json and
            generation_config.json end a reply; None builds one from the sizes below.
        hidden_size: width d of the residual stream; the MLP is 3 d wide.
        layers: number of decoder layers.
        heads: attention heads; heads of 32 (d / 32 of them) learned best at this size.
        initial_std: of new weights; at this width 0.1 learns in fewer steps than the usual 0.02.
        vocab_size: asked of the tokenizer that is fitted on environment text; a small corpus yields fewer.
        max_context: tokens that one sequence may hold. A model at `path` with fewer positions, or a window in
            every layer, takes as many as it can, which the run says and writes down; more than the
            length at which `longrope` turns to other angles is refused.
        device: auto takes cuda where there is one, else the cpu.
        dtype: that the engine generates in, and sends and holds its weights in. What is learned is float32
            whatever it is, and so is what a run saves; see `learner.compute_dtype` for the learner's layers.
        reply: what a reply looks like; a format with tags needs a tokenizer with a chat template. With
            `think_action` the policy thinks freely before its command, under `rollout.constrained` as well.
        template_arguments: given to the chat template whenever it is rendered, as in
            `template_arguments.enable_thinking=false`; one that it does not read is refused.
        max_observation_tokens: an observation is cut after so many tokens.
        tokenizer_episodes: random episodes of training tasks whose text a new tokenizer is fitted on.
    """

    path: str | None = None
    hidden_size: Annotated[int, Interval(ge=2, le=65536)] = 64
    layers: Annotated[int, Interval(ge=1, le=1024)] = 2
    heads: Annotated[int, Interval(ge=1, le=1024)] = 2
    initial_std: Annotated[float, Interval(gt=0, le=10)] = 0.1
    vocab_size: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    max_context: ContextTokens = 1024
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    reply: ReplyFormat = "plain"
    template_arguments: dict[str, Any] = field(default_factory=dict)
    max_observation_tokens: ContextTokens = 96
    tokenizer_episodes: Annotated[int, Interval(ge=1, le=1_000_000)] = 200

    def __post_init__(self) -> None:
        check_own_numbers(self, "policy")
        own = sorted(_NOT_ARGUMENTS & self.template_arguments.keys())
        if own:
            raise ConfigError(
                f"policy.template_arguments.{own[0]} is not a template's own argument but set by agentrl; "
                "wanted names that the tokenizer's chat template reads, such as enable_thinking"
            )


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Of the engine `vllm`.

    Args:
        url: of a server that is already running, "http://host:port"; None starts vLLM in this process.
        weights_folder: with a `url`, a folder that this machine and the server's see under the same path, in
            which new weights are handed over; None sends them from GPU to GPU by NCCL.
        reply_timeout: with a `url`, seconds after which a reply or an answer of the server is given up.
        gpu_memory_share: of the GPU's memory that vLLM takes for weights and cache; the learner needs some
            too where it computes on the same one.
        tensor_parallel_size: GPUs that share the weights of one copy.
        cpu_cache_gib: memory of the cache on a machine without a GPU, in GiB.
        eager: start fast and generate without compiled graphs; None does so on a CPU.
        max_restarts: times that vLLM is started again after it failed.
    """

    url: str | None = None
    weights_folder: str | None = None
    reply_timeout: Seconds = 600.0
    gpu_memory_share: Annotated[float, Interval(gt=0, lt=1)] = 0.4
    tensor_parallel_size: Annotated[int, Interval(ge=1, le=1024)] = 1
    cpu_cache_gib: Annotated[float, Interval(gt=0, le=65536)] = 1.0
    eager: bool | None = None
    max_restarts: OptionalCount = 2

    def __post_init__(self) -> None:
        check_own_numbers(self, "engine.vllm")
        if self.url is not None and not re.fullmatch(r"https?://[^/\s]+:\d+/?", self.url):
            raise ConfigError(f'engine.vllm.url is {self.url!r}, wanted "http://host:port", or null')
        if self.weights_folder is not None and self.url is None:
            raise ConfigError("engine.vllm.weights_folder is for a server; wanted engine.vllm.url as well")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Who generates, the `engine` block of a configuration.

    Args:
        name: torch keeps the model in this process and returns exact entropies; vllm needs the extra `vllm`.
        max_tokens: limit on a free-form reply, and on one that thinks before it chooses a command: thoughts
            get what the longest command leaves of it.
        actors: Ray actors that generate, each with a copy of the weights, on the cluster at
            `rollout.ray.address`; None generates in this process.
        actor_cpus: that Ray sets aside for each actor, which computes on as many; below 2, on one.
        actor_gpus: that Ray sets aside for each actor; with 0 it computes on the CPU.
        actor_restarts: lost actors that are replaced, in all; then those that are left go on alone.
        vllm: of the engine `vllm`.
    """

    name: Literal["torch", "vllm"] = "torch"
    max_tokens: ContextTokens = 64
    actors: Processes | None = None
    actor_cpus: Devices = 0.0
    actor_gpus: Devices = 0.0
    actor_restarts: OptionalCount = 16
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        check_own_numbers(self, "engine")

    @property
    def provides(self) -> frozenset[str]:
        """What components of an algorithm may require of this engine."""
        return frozenset({"rollout:entropy"})
