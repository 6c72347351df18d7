"""The `policy` and `engine` blocks of a configuration; does not import torch."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from agentrl.config import ContextTokens, Devices, OptionalCount, Processes, Seconds, check_own_numbers
from agentrl.errors import ConfigError

Device = Literal["auto", "cpu", "cuda", "mps"]
ReplyFormat = Literal["plain", "action_tags", "think_action", "subgoal_action", "tool_call"]
ENDPOINT = "openai:"  # begins the name of a policy that plays through a chat server

# Parameters of the rendering call, and names whose values come from the tokenizer.
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
    """The policy: a language model that exists, or a small decoder with random weights.

    Args:
        path: A causal language model with its tokenizer: a Hugging Face folder or a .gguf file on this
            machine, else a packaged model (`smollm2` or `gemma3-270m`), else an id of the Hugging Face hub
            (ORGANISATION/NAME). A LoRA adapter is merged into its base. The `eos_token_id` in config.json and
            generation_config.json end a reply. None builds a model from the sizes below.
        revision: The branch, tag or commit of a model from the hub; a run records the commit that it used.
        chat_template: A Jinja file that replaces the chat template of the model at `path`, for a base model
            without one; the trained model is saved with it.
        preset: Defaults for this kind of policy. `pretrained` suits learning rates, precision, lengths and
            stages to a model that was trained elsewhere, by its size; `scratch` changes nothing. Null takes
            `pretrained` where `path` is not the model of a run of `scratch`. Values that are given together
            with `path`, or later, override it.
        hidden_size: The width d of the residual stream; the MLP is 3 d wide.
        layers: The number of decoder layers.
        heads: The number of attention heads; heads of width 32 (d / 32 of them) learned best at this size.
        initial_std: The standard deviation of new weights; at this width 0.1 learns in fewer steps than the
            usual 0.02.
        vocab_size: The vocabulary size asked of the tokenizer that is fitted on environment text; a small
            corpus yields fewer ids.
        max_context: The largest number of tokens in a sequence; null takes what the texts of a few measured
            episodes need, if there is a `path`. A model at `path` with fewer positions, or
            with a window in every layer, uses its own limit, which the run reports and records; a value above
            the length at which `longrope` switches to other angles is refused.
        device: The device; auto takes cuda where there is one, else the cpu.
        dtype: The dtype of the engine's weights and computation. Learned and saved weights are float32 in any
            case; see `learner.compute_dtype` for the learner's layers.
        reply: The format of a reply; a format with tags needs a tokenizer with a chat template. With
            `think_action` the policy reasons freely before its command, under `rollout.constrained` as well.
            With `subgoal_action` it says whether it keeps its subgoal, and which one it has, in the same way.
            With `tool_call` it calls the tools that the environment declares, in the form of the template.
        template_arguments: The arguments passed to the chat template whenever it is rendered, for example
            `template_arguments.enable_thinking=false`; an argument that it does not read is refused.
        prompt: The template of what the policy reads each turn: `plain`, `literature`, `react`, or a Jinja
            file; `agentrl prompt` shows what it writes.
        history: The turns that a prompt shows: `full` continues one dialogue; a number k writes every prompt
            anew, with the last k turns; `none` shows the present alone. Null takes what the template says of
            itself: full for `plain` and `react`, 2 for `literature`.
        examples: The number of solved examples that the environment's expert plays for a template that shows
            some, as `react` does.
        system_message: The text of a system message; null leaves it to the chat template.
        max_observation_tokens: The number of tokens after which an observation is cut; the task is not, where
            the environment names it. Null cuts none.
        tokenizer_episodes: The number of random episodes of training tasks on whose text a new tokenizer is
            fitted.
    """

    path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    preset: Literal["scratch", "pretrained"] | None = None
    hidden_size: Annotated[int, Interval(ge=2, le=65536)] = 64
    layers: Annotated[int, Interval(ge=1, le=1024)] = 2
    heads: Annotated[int, Interval(ge=1, le=1024)] = 2
    initial_std: Annotated[float, Interval(gt=0, le=10)] = 0.1
    vocab_size: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    max_context: ContextTokens | None = 1024
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    reply: ReplyFormat = "plain"
    template_arguments: dict[str, Any] = field(default_factory=dict)
    prompt: str = "plain"
    history: Annotated[int, Interval(ge=1, le=1000)] | Literal["full", "none"] | None = None
    examples: Annotated[int, Interval(ge=0, le=16)] = 1
    system_message: str | None = None
    max_observation_tokens: ContextTokens | None = 96
    tokenizer_episodes: Annotated[int, Interval(ge=1, le=1_000_000)] = 200

    def __post_init__(self) -> None:
        check_own_numbers(self, "policy")
        for name in ("revision", "chat_template"):
            if self.path is None and getattr(self, name) is not None:
                raise ConfigError(f"policy.{name} is {getattr(self, name)!r}, but policy.path names no model")
        if self.path is None and self.max_context is None:
            raise ConfigError("policy.max_context is null, wanted a number without a policy.path")
        if self.path is None and self.preset == "pretrained":
            raise ConfigError("policy.preset is pretrained, wanted scratch or null without a policy.path")
        given = _NOT_ARGUMENTS | ({"tools"} if self.reply == "tool_call" else set())
        own = sorted(given & self.template_arguments.keys())
        if own:
            raise ConfigError(
                f"policy.template_arguments.{own[0]} is set by agentrl, not an argument of the template; "
                "wanted names that the tokenizer's chat template reads, such as enable_thinking"
            )


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Settings of the engine `vllm`.

    Args:
        url: The address of a running server, "http://host:port"; None starts vLLM in this process.
        weights_folder: With a `url`, a folder that this machine and the server see under the same path,
            through which new weights are sent; None sends them from GPU to GPU by NCCL.
        reply_timeout: With a `url`, the time in seconds to wait for a reply or another answer of the server.
        gpu_memory_share: The fraction of the GPU's memory that vLLM takes for weights and cache; leave enough
            for a learner on the same GPU.
        tensor_parallel_size: The number of GPUs that share the weights of one copy.
        cpu_cache_gib: The size of the cache on a machine without a GPU, in GiB.
        eager: Whether to start fast and generate without compiled graphs; None does so on a CPU only.
        lora: How vLLM gets what `learner.lora` trains: `adapter` sends the frozen weights once and then only
            adapters, at a rank of 512 at most; `merged` sends all weights, with adapters merged into them, as
            a server without a `weights_folder` gets them in any case.
        max_restarts: The number of times that vLLM is restarted after a failure.
    """

    url: str | None = None
    weights_folder: str | None = None
    reply_timeout: Seconds = 600.0
    gpu_memory_share: Annotated[float, Interval(gt=0, lt=1)] = 0.4
    tensor_parallel_size: Annotated[int, Interval(ge=1, le=1024)] = 1
    cpu_cache_gib: Annotated[float, Interval(gt=0, le=65536)] = 1.0
    eager: bool | None = None
    lora: Literal["adapter", "merged"] = "adapter"
    max_restarts: OptionalCount = 2

    def __post_init__(self) -> None:
        check_own_numbers(self, "engine.vllm")
        if self.url is not None and not re.fullmatch(r"https?://[^/\s]+:\d+/?", self.url):
            raise ConfigError(f'engine.vllm.url is {self.url!r}, wanted "http://host:port" or null')
        if self.weights_folder is not None and self.url is None:
            raise ConfigError("engine.vllm.weights_folder is for a server; wanted engine.vllm.url as well")


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """Requests to a chat server, which `agentrl evaluate --policy openai:MODEL` sends.

    The server's address and the key are not part of a configuration.

    Args:
        timeout: The deadline of a request in seconds, from sending it to the last byte of its answer.
        retries: The number of times that a request is sent again after a lost connection, a missed deadline,
            a malformed answer, or a status that says to try later (408, 409, 425, 429 and from 500 on).
        max_wait: The longest wait before sending it again, in seconds. A server that asks for more
            (Retry-After) is not asked again.
    """

    timeout: Seconds = 120.0
    retries: OptionalCount = 6
    max_wait: Seconds = 60.0

    def __post_init__(self) -> None:
        check_own_numbers(self, "engine.endpoint")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The `engine` block of a configuration: where and how replies are generated.

    Args:
        name: The engine; torch runs the model in this process, vllm needs the extra `vllm`. Both return exact
            entropies.
        max_tokens: The largest number of tokens in a free reply, or in one that reasons before it chooses a
            command: the reasoning gets what the longest command leaves.
        actors: The number of Ray actors that generate, each with a copy of the weights, on the cluster at
            `rollout.ray.address`; None generates in this process.
        actor_cpus: The number of CPUs that Ray reserves for each actor, and of its threads; below 2, one
            thread.
        actor_gpus: The number of GPUs that Ray reserves for each actor; 0 computes on the CPU.
        actor_restarts: The total number of lost actors that are replaced; after that, the others go on alone.
        vllm: The settings of the engine `vllm`.
        endpoint: The requests to a chat server, for evaluation alone; it takes the place of an engine.
    """

    name: Literal["torch", "vllm"] = "torch"
    max_tokens: ContextTokens = 64
    actors: Processes | None = None
    actor_cpus: Devices = 0.0
    actor_gpus: Devices = 0.0
    actor_restarts: OptionalCount = 16
    vllm: VllmConfig = field(default_factory=VllmConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        check_own_numbers(self, "engine")

    @property
    def takes_adapters(self) -> bool:
        """Return whether adapters are sent to this engine as such; else they are merged into the weights."""
        by_nccl = self.vllm.url is not None and self.vllm.weights_folder is None
        return self.name == "vllm" and self.vllm.lora == "adapter" and not by_nccl

    @property
    def provides(self) -> frozenset[str]:
        """Return the features of this engine that algorithm components may require."""
        here = self.name == "torch" and self.actors is None
        own = {"rollout:token_temperature", "rollout:confidence"} if here else set()
        return frozenset({"rollout:entropy"}) | own
