"""`VllmServerEngine`: generation over HTTP on a vLLM server that is already running."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import torch
from transformers import PreTrainedModel

from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.lora import blank_adapter
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter, Generation, GenerationRequest, SamplingParams
from agentrl.policy.model import context_length, hidden_states, output_weight
from agentrl.policy.settings import VllmConfig
from agentrl.scale.vllm_lora import NAME, room, write_adapter
from agentrl.scale.vllm_replies import PendingReply, Sequences, sampling_arguments
from agentrl.scale.vllm_weights import shape_of, write_weights

SERVE = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0 vllm serve FOLDER --dtype DTYPE --enable-scale-out "
    "--skip-tokenizer-init --logprobs-mode processed_logprobs "
    "--logits-processors agentrl.scale.vllm_choices:TokenTrieProcessor "
    "--worker-extension-cls agentrl.scale.vllm_choices.PolicyWorker "
    "(on a CPU also --no-enable-chunked-prefill --max-num-batched-tokens N, of at least max_model_len)"
)
SERVE_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank"
_CONNECT_TIMEOUT = 10.0  # seconds
_WAIT = 0.05  # seconds that a step waits for a reply, so that environments are served in between
_PROBE_TOKENS = 16


def check_answers(url: str) -> None:
    """Refuse an address where no vLLM server answers.

    Raises:
        ConfigError: With the command that starts a server.
    """
    try:
        models = httpx2.get(f"{url.rstrip('/')}/v1/models", timeout=_CONNECT_TIMEOUT)
        kind = models.json()["data"][0]["owned_by"]
    except httpx2.HTTPError as error:
        raise ConfigError(
            f"engine.vllm.url: nothing answers at {url} ({error}); start a server there: {SERVE}"
        ) from error
    except (ValueError, LookupError, TypeError):
        kind = None
    if kind != "vllm":
        raise ConfigError(
            f"engine.vllm.url: the server at {url} is not a vLLM server; start one on a free port: {SERVE}"
        )


class VllmServerEngine:
    """Generation on a vLLM server, which batches the requests in flight.

    The user starts the server with the command `SERVE`, in an environment that has agentrl: its workers then
    mask logits with the same token trie and compute exact entropies as those of `VllmEngine` do. `refresh`
    pauses the server, sends the weights and lets replies in flight continue with them; the version of every
    token is known. Where adapters are sent as such, the server holds one, `NAME`, which each new one replaces
    in place: a blank one until `refresh` gets the first. A reply that fails comes back as lost; the server is
    never restarted from here.

    Args:
        model: The model whose weights are sent; the server must serve a model of the same shape.
        config: The address of the server, and the way in which weights are sent.
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        max_context: The largest number of tokens in a sequence; None takes the model's own limit.
        max_sequences: The largest number of replies in flight; further requests wait.
        adapters: The largest adapters that `refresh` gets; None for none.

    Raises:
        ConfigError: If nothing answers at the url, or the server lacks the options of `SERVE`, serves another
            model, has too short a context, or gives other logprobs than the model with the same weights.
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
        if config.url is None:
            raise ValueError("config.url is None, wanted the address of a server")
        self.model = model
        self.max_context = context_length(model, max_context)
        self._url, self._config = config.url, config
        self._sequences = Sequences(
            stop_ids=stop_ids, vocabulary=output_weight(model).shape[0], max_context=self.max_context
        )
        self._client = httpx2.Client(
            base_url=config.url,
            timeout=httpx2.Timeout(config.reply_timeout, connect=_CONNECT_TIMEOUT),
            limits=httpx2.Limits(max_connections=None),
        )
        self._threads = ThreadPoolExecutor(max_sequences, "vllm-server")
        self._running: dict[Future[Mapping[str, Any]], PendingReply] = {}
        self._abandoned_keys: list[str] = []  # keys whose entropies nobody will read
        self._finished: list[Generation] = []
        self._version = 0
        self._sender: Any = None
        self._adapters = adapters
        self._blank = None if adapters is None else blank_adapter(model, adapters)
        try:
            self._check_server()
            self.refresh(0)
            self._check_logprobs()
        except BaseException:
            self.close()
            raise

    def submit(self, request: GenerationRequest) -> None:
        """Send a request; one that cannot be served comes back from the next `step` with an error."""
        reply = self._sequences.begin(request, self._version)
        if isinstance(reply, str):
            self._finished.append(Generation(request.sequence, policy_version=self._version, error=reply))
        elif reply.done:
            self._finished.append(self._sequences.end(reply))
        else:
            self._running[self._threads.submit(self._generate, reply)] = reply

    def step(self) -> Sequence[Generation]:
        """Return the replies that have arrived; wait `_WAIT` seconds at most for the first."""
        if self._running and not self._finished:
            wait(self._running, timeout=_WAIT, return_when=FIRST_COMPLETED)
        come = {future: reply for future, reply in self._running.items() if future.done()}
        if come:
            self._take(come)
        finished, self._finished = self._finished, []
        return finished

    def release(self, sequence: str) -> None:
        """Forget a sequence and its request in flight; unknown names are fine."""
        reply = self._sequences.release(sequence)
        for future, running in list(self._running.items()):
            if running is reply:
                del self._running[future]
                self._abandoned_keys.append(running.key)
                if not future.cancel():
                    self._threads.submit(self._abort, [running.key])

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        """Send the model's current weights or an adapter to the server, which recomputes its cache as needed.

        Raises:
            ConfigError: If the server cannot read the folder of the weights, or takes no adapter.
            AgentRLError: If it no longer answers, or fails.
        """
        self._version = version
        self._call("POST", "/pause", params={"mode": "keep"})
        try:
            if adapter is None:
                self._replace_weights()
            if (present := adapter or self._blank) is not None:
                self._replace_adapter(present)
            self._call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})
            self._call("POST", "/update_weight_version", {"new_version": str(version)})
        finally:
            self._call("POST", "/resume")

    def close(self) -> None:
        """Abort the requests in flight and disconnect; the server keeps running with its weights."""
        keys = [reply.key for reply in self._running.values()]
        for future in self._running:
            future.cancel()
        self._running.clear()
        if keys:
            self._abort(keys)
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    # Replies

    def _generate(self, reply: PendingReply) -> Mapping[str, Any]:
        body = {
            "request_id": reply.key,
            "token_ids": reply.prompt,
            "sampling_params": sampling_arguments(reply),
        }
        if self._adapters is not None:
            body["model"] = NAME
        answer: Mapping[str, Any] = self._call("POST", "/inference/v1/generate", body)["choices"][0]
        return answer

    def _take(self, come: Mapping[Future[Mapping[str, Any]], PendingReply]) -> None:
        try:
            entropies = self._entropies([*(reply.key for reply in come.values()), *self._abandoned_keys])
        except AgentRLError as error:
            for future, reply in come.items():
                del self._running[future]
                self._finished.append(self._sequences.fail(reply, str(error), lost=True))
            return
        self._abandoned_keys.clear()
        for future, reply in come.items():
            del self._running[future]
            try:
                self._fill(reply, future.result(), dict(entropies.get(reply.key, ())))
            except ValueError as mistake:
                self._finished.append(self._sequences.fail(reply, str(mistake)))
            except (AgentRLError, LookupError, TypeError) as error:
                self._finished.append(self._sequences.fail(reply, str(error), lost=True))
                continue
            if reply.done:
                self._finished.append(self._sequences.end(reply))
            else:  # its reasoning ended; the choice is a new request
                self._running[self._threads.submit(self._generate, reply)] = reply

    def _fill(self, reply: PendingReply, answer: Mapping[str, Any], entropies: Mapping[int, float]) -> None:
        tokens, details = answer["token_ids"], answer["logprobs"]["content"]
        versions = [self._version] * len(tokens)
        for span in answer.get("weight_versions") or ():
            versions[span["start"] : span["end"]] = [int(span["version"])] * (span["end"] - span["start"])
        asked = reply.key
        for place, token in enumerate(tokens):
            if not reply.done and reply.key == asked:
                reply.take(token, details[place]["logprob"], entropies[place], versions[place])
        if not reply.done and reply.key == asked:
            raise ValueError(f"the server ended the reply early: {answer.get('finish_reason')}")

    def _entropies(self, keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for each in self._rpc("take_entropies", keys=list(keys)):
            found |= {key: [(place, value) for place, value in pairs] for key, pairs in each.items()}
        return found

    def _abort(self, keys: Sequence[str]) -> None:
        names = [f"generate-tokens-{key}" for key in keys]  # the prefix that the server adds
        with suppress(AgentRLError):  # a server that does not answer generates nothing either
            self._call("POST", "/abort_requests", {"request_ids": names})

    # Weights

    def _replace_weights(self) -> None:
        if self._config.weights_folder is None:
            self._send_weights()
            return
        with self._written("weights", partial(write_weights, self.model)) as place:
            self._rpc("reload_weights", weights_path=place)
            self._rpc("renew_head")

    def _replace_adapter(self, adapter: Adapter) -> None:
        with self._written("adapter", partial(write_adapter, adapter)) as place:
            # The server knows an adapter by name from its first load. It would load one that is replaced by
            # the same call again at every step, so the workers replace it by themselves.
            if not self._knows_adapter():
                try:
                    self._call("POST", "/v1/load_lora_adapter", {"lora_name": NAME, "lora_path": place})
                except AgentRLError:
                    if not self._knows_adapter():  # else another rank was faster
                        raise
            self._rpc("replace_adapter", folder=place)

    def _knows_adapter(self) -> bool:
        return NAME in {model["id"] for model in self._call("GET", "/v1/models")["data"]}

    @contextmanager
    def _written(self, what: str, write: Callable[[Path], None]) -> Iterator[str]:
        """Write files into a folder that exists within the block, in which the server reads them."""
        folder = Path(self._config.weights_folder or "").absolute()
        place = folder / f"agentrl-{what}-{uuid4().hex[:12]}"
        try:
            try:
                write(place)
            except OSError as error:
                raise ConfigError(
                    f"engine.vllm.weights_folder: {place} cannot be written: {error}"
                ) from error
            try:
                yield str(place)
            except AgentRLError as error:
                raise ConfigError(
                    f"engine.vllm.weights_folder: the server at {self._url} cannot load the {what} in "
                    f"{place}, which it must see under this path: {error}"
                ) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _send_weights(self) -> None:
        """Broadcast the weights from GPU to GPU by NCCL.

        Written against the documented interface of vLLM 0.32 and never run, since both sides need GPUs. The
        server needs `--weight-transfer-config '{"backend": "nccl"}'` as well.
        """
        from vllm.distributed.weight_transfer import nccl_engine
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.utils.network_utils import get_ip, get_open_port

        if self._sender is None:
            workers = int(self._call("GET", "/get_world_size")["world_size"])
            self._sender = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
                nccl_engine.NCCLTrainerInitInfo(
                    master_address=get_ip(), master_port=get_open_port(), world_size=workers + 1, rank=0
                ),
                client=HTTPVLLMWeightSyncClient(self._url, self._config.reply_timeout),
                source=ModuleSource(self.model),
            )
        self._sender.send_weights()

    # The server

    def _check_server(self) -> None:
        check_answers(self._url)
        try:
            served = self._rpc("describe_policy")[0]
        except AgentRLError as error:
            raise ConfigError(
                f"engine.vllm.url: the server at {self._url} lacks options that agentrl needs ({error}); "
                f"start it with: {SERVE}"
            ) from error
        self._check_served(served)

    def _check_served(self, served: Mapping[str, Any]) -> None:
        self._dtype = str(served["dtype"])
        ours = shape_of(self.model.config.get_text_config())
        wrong = [
            f"{name} is {served['shape'].get(name)}, wanted {value}"
            for name, value in ours.items()
            if served["shape"].get(name) != value
        ]
        if wrong:
            raise ConfigError(
                f"engine.vllm.url: the server at {self._url} serves another model: {'; '.join(wrong)}"
            )
        if served["max_context"] < self.max_context:
            raise ConfigError(
                f"engine.vllm.url: the server at {self._url} has max_model_len={served['max_context']}, "
                f"wanted at least {self.max_context} (policy.max_context)"
            )
        if not served["masks"] or served["logprobs_mode"] != "processed_logprobs":
            raise ConfigError(
                f"engine.vllm.url: the server at {self._url} lacks options that agentrl needs; start it "
                f"with: {SERVE}"
            )
        if self._adapters is not None and not _takes(served, self._adapters):
            raise ConfigError(
                f"engine.vllm.lora: the server at {self._url} does not take one adapter of rank "
                f"{self._adapters.rank}; start it with {SERVE_ADAPTERS} {room(self._adapters)} as well, or "
                "set engine.vllm.lora=merged"
            )

    def _check_logprobs(self) -> None:
        """Sample a few tokens on the server, and compare its logprobs with the model's."""
        vocabulary = output_weight(self.model).shape[0]
        length = min(8, self.max_context - 1)
        prompt = tuple(7919 * (place + 1) % vocabulary for place in range(length))
        name = f"probe-{uuid4().hex[:12]}"
        self.submit(GenerationRequest(name, prompt, True, None, 0, SamplingParams(1.0, _PROBE_TOKENS)))
        replies: Sequence[Generation] = ()
        while not replies:
            replies = self.step()
        self.release(name)
        reply = replies[0]
        if reply.error is not None:
            raise ConfigError(f"engine.vllm.url: the server at {self._url} fails: {reply.error}: {SERVE}")
        ids = torch.tensor([*prompt, *reply.token_ids], device=output_weight(self.model).device)
        with torch.inference_mode():
            hidden = hidden_states(self.model, ids, torch.tensor([len(ids)]))[length - 1 : -1]
            logprobs = (hidden @ output_weight(self.model).T).float().log_softmax(-1)
        ours = logprobs.gather(1, ids[length:].unsqueeze(1)).squeeze(1).tolist()
        worst = max(abs(one - other) for one, other in zip(ours, reply.logprobs, strict=True))
        exact = output_weight(self.model).dtype == torch.float32 and self._dtype == "float32"
        tolerance = 1e-3 if exact else 0.1
        if not worst <= tolerance:
            raise ConfigError(
                f"engine.vllm.url: with the same weights the server at {self._url} gives other logprobs than "
                f"the model (largest difference {worst:.3g} nats, wanted at most {tolerance}); it serves "
                f"another architecture, in {self._dtype}"
            )

    def _rpc(self, method: str, **arguments: Any) -> list[Any]:
        answer = self._call("POST", "/collective_rpc", {"method": method, "kwargs": arguments})
        results: list[Any] = answer["results"]
        return results

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        try:
            answer = self._client.request(method, path, json=body, params=params)
        except httpx2.HTTPError as error:
            raise AgentRLError(
                f"the vLLM server at {self._url} does not answer: {type(error).__name__}: {error}"
            ) from error
        if answer.status_code != 200:
            raise AgentRLError(
                f"the vLLM server at {self._url} answers {path} with {answer.status_code}: "
                f"{answer.text[:500]}"
            )
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.json() if is_json and answer.content else None


def _takes(served: Mapping[str, Any], adapters: LoraConfig) -> bool:
    return bool(served["lora_rank"] >= adapters.rank and served["lora_slots"] == 1 and served["lora_updates"])
