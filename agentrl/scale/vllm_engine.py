"""`VllmEngine`: vLLM inside this process, driven step by step."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.lora import blank_adapter
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter, Generation, GenerationRequest
from agentrl.policy.model import context_length, output_weight
from agentrl.policy.settings import VllmConfig
from agentrl.scale.vllm_lora import NAME, RANKS, room, write_adapter
from agentrl.scale.vllm_replies import PendingReply, Sequences, sampling_arguments
from agentrl.scale.vllm_weights import named_weights, write_architecture

# vLLM reads these on import; values that the user has set are kept.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # runs its core in this process, where a step is a call
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # version 2 has another interface for logits processors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)

from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

GIB = 1 << 30
CPU_STEP_TOKENS = 4096


class VllmEngine:
    """Continuous batching by vLLM, over a copy of a model's weights that `refresh` overwrites in place.

    Token ids go in and out. vLLM's prefix cache keeps what earlier turns and siblings have computed. Choices
    are decoded by a token trie as in `TorchEngine`, and entropies are exact: a logits processor computes them
    where vLLM samples. Replies in flight during a `refresh` keep their tokens and continue with the new
    weights. The same seed and weights give the same reply again, but not the reply of `TorchEngine`, whose
    random generator differs.

    Where adapters are sent as such, vLLM holds one under one number, which each new one replaces in place: a
    blank one until `refresh` gets the first.

    When vLLM fails, requests in flight come back as lost and vLLM is restarted.

    Args:
        model: The model whose weights it copies, of an architecture that vLLM supports.
        config: The settings of vLLM; `url` is ignored.
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        max_context: The largest number of tokens in a sequence; None takes the model's own limit.
        max_sequences: The largest number of replies in flight; further requests wait.
        adapters: The largest adapters that `refresh` gets; None for none.

    Attributes:
        restarts: The number of times that vLLM was restarted.

    Raises:
        ConfigError: If vLLM does not start with this model or these settings, or this process is already in
            a torch.distributed group.
    """

    provides = frozenset({"rollout:entropy"})

    def __init__(
        self,
        model: PreTrainedModel,
        config: VllmConfig,
        *,
        stop_ids: Iterable[int],
        max_context: int | None = None,
        max_sequences: int = 256,
        adapters: LoraConfig | None = None,
    ) -> None:
        if dist.is_initialized():
            # vLLM creates its own groups, and destroys every group of the process when it closes.
            raise ConfigError(
                "engine.name=vllm: this process is in a torch.distributed group already, of torchrun or of "
                "another vLLM; wanted a process of its own, as engine.actors gives it one"
            )
        self.model = model
        self.max_context = context_length(model, max_context)
        self.max_sequences = max_sequences
        self.restarts = 0
        self._config = config
        self._sequences = Sequences(
            stop_ids=stop_ids, vocabulary=output_weight(model).shape[0], max_context=self.max_context
        )
        self._running: dict[str, PendingReply] = {}
        self._abandoned_keys: list[str] = []  # keys whose entropies nobody will read
        self._finished: list[Generation] = []
        self._version = 0
        self._folder = TemporaryDirectory(prefix="agentrl-vllm-")
        write_architecture(model, Path(self._folder.name))
        self._adapters = adapters
        self._adapter = self._blank = None if adapters is None else blank_adapter(model, adapters)
        self._llm: Any = None
        try:
            with _preserve_generators():
                self._start()
                self._check_generation()
        except Exception as error:
            self.close()
            remedy = "" if adapters is None else " (without adapters: engine.vllm.lora=merged)"
            raise ConfigError(
                f"engine.name=vllm: vLLM does not start with {type(model).__name__} and {config}{remedy}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; one that cannot be served comes back from the next `step` with an error."""
        reply = self._sequences.begin(request, self._version)
        if isinstance(reply, str):
            self._finished.append(Generation(request.sequence, policy_version=self._version, error=reply))
        elif reply.done:
            self._finished.append(self._sequences.end(reply))
        else:
            self._running[reply.key] = reply
            self._add(reply)

    def step(self) -> Sequence[Generation]:
        """Advance every request by one step of vLLM; return those that finished.

        Raises:
            AgentRLError: If vLLM failed and no restarts are left.
        """
        if self._running:
            try:
                self._advance()
            except Exception as error:
                self._fail(error)
        finished, self._finished = self._finished, []
        return finished

    def release(self, sequence: str) -> None:
        """Forget a sequence and its request in flight; unknown names are fine."""
        reply = self._sequences.release(sequence)
        if reply is not None and self._running.pop(reply.key, None) is not None:
            self._llm.abort_request([reply.key])
            self._abandoned_keys.append(reply.key)

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        """Copy the model's current weights or an adapter into vLLM, which recomputes its cache as needed.

        Raises:
            AgentRLError: If vLLM failed and no restarts are left.
        """
        self._version, self._adapter = version, adapter or self._blank
        try:
            if adapter is None:
                self._copy_weights()
            self._load_adapter()
            self._llm.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Shut vLLM down and free its memory."""
        self._shut_down()
        self._folder.cleanup()

    def _start(self) -> None:
        cpu, config, adapters = current_platform.is_cpu(), self._config, self._adapters
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=self._folder.name,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(output_weight(self.model).dtype).removeprefix("torch."),
                max_model_len=self.max_context,
                max_num_seqs=self.max_sequences,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_share,
                kv_cache_memory_bytes=int(config.cpu_cache_gib * GIB) if cpu else None,
                enforce_eager=cpu if config.eager is None else config.eager,
                enable_prefix_caching=True,
                # Chunked prompts need an offset in the random generator, which torch has on GPUs only.
                enable_chunked_prefill=False if cpu else None,
                max_num_batched_tokens=max(self.max_context, CPU_STEP_TOKENS) if cpu else None,
                logprobs_mode="processed_logprobs",
                logits_processors=["agentrl.scale.vllm_choices:TokenTrieProcessor"],
                worker_extension_cls="agentrl.scale.vllm_choices.PolicyWorker",
                async_scheduling=False,
                disable_log_stats=True,
                enable_lora=adapters is not None,
                max_lora_rank=RANKS[0] if adapters is None else room(adapters),
                lora_target_modules=None if adapters is None else list(adapters.targets),
            )
        )
        self._copy_weights()
        self._load_adapter()

    def _check_generation(self) -> None:
        """Generate one token, so that a model that vLLM cannot run fails at the start."""
        params = SamplingParams(max_tokens=1, detokenize=False)
        self._llm.add_request("try-out", {"prompt_token_ids": [0]}, params, lora_request=self._lora())
        while self._llm.has_unfinished_requests():
            self._llm.step()

    def _copy_weights(self) -> None:
        weights: Iterable[tuple[str, Tensor]] = named_weights(self.model)
        if self._config.tensor_parallel_size > 1:
            weights = [
                (name, weight.cpu()) for name, weight in weights
            ]  # since they are sent to other processes
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.collective_rpc("renew_head")

    def _load_adapter(self) -> None:
        if self._adapter is not None:
            write_adapter(self._adapter, self._adapter_folder)
            self._llm.add_lora(self._lora(load_inplace=True))

    def _lora(self, **more: Any) -> LoRARequest | None:
        """Return what a request says of its adapter; loading in place is for one that changed."""
        return None if self._adapter is None else LoRARequest(NAME, 1, str(self._adapter_folder), **more)

    @property
    def _adapter_folder(self) -> Path:
        return Path(self._folder.name) / "adapter"

    def _add(self, reply: PendingReply) -> None:
        try:
            params = SamplingParams(**sampling_arguments(reply), output_kind=RequestOutputKind.DELTA)
            params.skip_clone = True  # a menu is large, and these are not shared
            prompt = {"prompt_token_ids": reply.prompt}
            self._llm.add_request(reply.key, prompt, params, lora_request=self._lora())
        except Exception as error:
            self._end(reply, f"vLLM refused the request: {type(error).__name__}: {error}")

    def _advance(self) -> None:
        outputs = self._llm.step()
        keys = [*self._running, *self._abandoned_keys]
        self._abandoned_keys.clear()
        found: dict[str, list[tuple[int, float]]] = {}
        for each in self._llm.collective_rpc("take_entropies", args=(keys,)):
            found |= each
        ended: list[str] = []
        renewed: list[PendingReply] = []
        for output in outputs:
            reply = self._running.get(output.request_id)
            if reply is None:
                continue
            sampled, asked = output.outputs[0], reply.key
            entropies = dict(found.get(reply.key, ()))
            try:
                for token, candidates in zip(sampled.token_ids, sampled.logprobs or (), strict=True):
                    if reply.key != asked:
                        break  # its reasoning ended; the choice is a new request
                    entropy = entropies[reply.received]
                    reply.take(token, candidates[token].logprob, entropy, self._version)
            except ValueError as mistake:
                self._end(reply, str(mistake))
                ended.append(asked)
                continue
            if reply.key != asked:
                self._running[reply.key] = self._running.pop(asked)
                self._abandoned_keys.append(asked)
                ended.append(asked)
                renewed.append(reply)
            elif reply.done:
                self._end(reply)
                ended.append(asked)
            elif output.finished:
                self._end(reply, f"vLLM ended the reply early: {sampled.finish_reason}")
        # vLLM would continue these, for example past the last decision of a choice.
        self._llm.abort_request(ended)
        for reply in renewed:
            if reply.done:
                self._end(reply)
            else:
                self._add(reply)

    def _end(self, reply: PendingReply, error: str | None = None, *, lost: bool = False) -> None:
        self._running.pop(reply.key, None)
        self._finished.append(
            self._sequences.end(reply) if error is None else self._sequences.fail(reply, error, lost=lost)
        )

    def _fail(self, error: Exception) -> None:
        """Answer the requests in flight as lost, and restart vLLM while restarts are left."""
        why = f"{type(error).__name__}: {error}"
        for reply in list(self._running.values()):
            self._end(reply, f"vLLM failed: {why}", lost=True)
        while True:
            if self.restarts >= self._config.max_restarts:
                raise AgentRLError(
                    f"vLLM failed {self.restarts + 1} times, more than engine.vllm.max_restarts="
                    f"{self._config.max_restarts} allows; last error: {why}"
                ) from error
            self.restarts += 1
            self._shut_down()
            try:
                with _preserve_generators():
                    self._start()
                return
            except Exception as again:
                why, error = f"{type(again).__name__}: {again}", again

    def _shut_down(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.engine_core.shutdown()
        del llm
        if dist.is_initialized():  # a failed start leaves its groups behind
            cleanup_dist_env_and_memory()
        gc.collect()  # its objects form cycles that hold the memory of the cache


@contextmanager
def _preserve_generators() -> Iterator[None]:
    """Restore the global random generators after the block, in which vLLM seeds them."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
