"""`VllmEngine`: vLLM in this process, driven step by step."""

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
from agentrl.policy.engine import Generation, GenerationRequest
from agentrl.policy.model import context_length, output_weight
from agentrl.policy.settings import VllmConfig
from agentrl.scale.vllm_replies import PendingReply, Sequences, sampling_arguments
from agentrl.scale.vllm_weights import named_weights, write_architecture

# Read by vLLM as it is imported; what the user has set stays.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its core shall run here, where a step is a call
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one has another interface for logits processors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)

from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

GIB = 1 << 30
CPU_STEP_TOKENS = 4096


class VllmEngine:
    """Continuous batching by vLLM, over a copy of a model's weights that `refresh` writes anew in place.

    Token ids go in and out. vLLM's prefix cache holds what earlier turns and siblings have computed. Choices
    are decoded by a token trie as in `TorchEngine`, and entropies are exact: a logits processor computes them
    where vLLM samples. Replies in flight during a `refresh` keep their tokens and go on with the new
    weights. A request draws the same again from the same seed and weights, but not what `TorchEngine` draws:
    the generators differ.

    When vLLM fails, what was in flight comes back as lost and vLLM is started again.

    Args:
        model: whose weights it copies, of an architecture that vLLM knows.
        config: of vLLM; `url` is not looked at.
        stop_ids: end a free reply; every choice ends in one of them.
        max_context: tokens that a sequence may hold; None takes the model's own limit.
        max_sequences: replies in flight at once; further ones wait.

    Attributes:
        restarts: how often vLLM was started again.

    Raises:
        ConfigError: vLLM does not start with this model or these settings, or shares this process with
            another one.
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
    ) -> None:
        if dist.is_initialized():
            # vLLM makes groups of its own, and on its end destroys all that there are.
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
        self._abandoned_keys: list[str] = []  # keys that entropies may be noted under for nobody
        self._finished: list[Generation] = []
        self._version = 0
        self._folder = TemporaryDirectory(prefix="agentrl-vllm-")
        write_architecture(model, Path(self._folder.name))
        self._llm: Any = None
        try:
            with _preserve_generators():
                self._start()
                self._check_generation()
        except Exception as error:
            self.close()
            raise ConfigError(
                f"engine.name=vllm: vLLM does not start with {type(model).__name__} and {config}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def submit(self, request: GenerationRequest) -> None:
        """Take a request; one that cannot be served comes back from the next `step` with its error."""
        reply = self._sequences.begin(request, self._version)
        if isinstance(reply, str):
            self._finished.append(Generation(request.sequence, policy_version=self._version, error=reply))
        elif reply.done:
            self._finished.append(self._sequences.end(reply))
        else:
            self._running[reply.key] = reply
            self._add(reply)

    def step(self) -> Sequence[Generation]:
        """Let vLLM advance every request; return those that finished.

        Raises:
            AgentRLError: vLLM failed more often than it may be started again.
        """
        if self._running:
            try:
                self._advance()
            except Exception as error:
                self._fail(error)
        finished, self._finished = self._finished, []
        return finished

    def release(self, sequence: str) -> None:
        """Forget a sequence and what is running for it; unknown names are fine."""
        reply = self._sequences.release(sequence)
        if reply is not None and self._running.pop(reply.key, None) is not None:
            self._llm.abort_request([reply.key])
            self._abandoned_keys.append(reply.key)

    def refresh(self, version: int) -> None:
        """Write the model's weights of now into vLLM; what the old ones left in its cache is made anew.

        Raises:
            AgentRLError: vLLM failed more often than it may be started again.
        """
        self._version = version
        try:
            self._copy_weights()
            self._llm.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """End vLLM and give back its memory."""
        self._shut_down()
        self._folder.cleanup()

    def _start(self) -> None:
        cpu, config = current_platform.is_cpu(), self._config
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
                # A prompt in parts needs an offset in its generator, which torch has on GPUs only.
                enable_chunked_prefill=False if cpu else None,
                max_num_batched_tokens=max(self.max_context, CPU_STEP_TOKENS) if cpu else None,
                logprobs_mode="processed_logprobs",
                logits_processors=["agentrl.scale.vllm_choices:TokenTrieProcessor"],
                worker_extension_cls="agentrl.scale.vllm_choices.PolicyWorker",
                async_scheduling=False,
                disable_log_stats=True,
            )
        )
        self._copy_weights()

    def _check_generation(self) -> None:
        """Generate a token: what vLLM cannot compute it says here first."""
        params = SamplingParams(max_tokens=1, detokenize=False)
        self._llm.add_request("try-out", {"prompt_token_ids": [0]}, params)
        while self._llm.has_unfinished_requests():
            self._llm.step()

    def _copy_weights(self) -> None:
        weights: Iterable[tuple[str, Tensor]] = named_weights(self.model)
        if self._config.tensor_parallel_size > 1:
            weights = [(name, weight.cpu()) for name, weight in weights]  # to be sent to other processes
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.collective_rpc("renew_head")

    def _add(self, reply: PendingReply) -> None:
        try:
            params = SamplingParams(**sampling_arguments(reply), output_kind=RequestOutputKind.DELTA)
            params.skip_clone = True  # a menu is large, and nobody else holds these
            self._llm.add_request(reply.key, {"prompt_token_ids": reply.prompt}, params)
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
                        break  # what comes after its thoughts is asked for anew
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
        # Those that vLLM would go on with, as after the last decision of a choice.
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
        """Give up what is in flight and start vLLM again, as often as is allowed."""
        why = f"{type(error).__name__}: {error}"
        for reply in list(self._running.values()):
            self._end(reply, f"vLLM failed: {why}", lost=True)
        while True:
            if self.restarts >= self._config.max_restarts:
                raise AgentRLError(
                    f"vLLM failed {self.restarts + 1} times, more than engine.vllm.max_restarts="
                    f"{self._config.max_restarts} allows; the last time: {why}"
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
        if dist.is_initialized():  # a start that failed leaves what it had made
            cleanup_dist_env_and_memory()
        gc.collect()  # its parts refer to each other, and hold the cache's memory


@contextmanager
def _preserve_generators() -> Iterator[None]:
    """Keep the global generators as they are: vLLM seeds them all."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
