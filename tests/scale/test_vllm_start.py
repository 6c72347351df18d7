"""Starting and closing vLLM in this process, one after the other: `make test-vllm` runs these."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from vllm_cases import (
    CONTEXT,
    LORA,
    STOP,
    finish,
    furthest,
    merged,
    needs_vllm,
    policy,
    random_adapter,
    request,
    several,
)

from agentrl.errors import ConfigError
from agentrl.learn.lora import blank_adapter
from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.scale.engine_host import EngineHost, EngineSpec, export_weights, strip_weights
from agentrl.scale.engines import open_engine
from agentrl.scale.messages import pack_requests, unpack_generations

pytestmark = needs_vllm


def _open(**more: Any) -> Any:
    config = EngineConfig("vllm", vllm=VllmConfig(**{"cpu_cache_gib": 0.25} | more))
    return open_engine(policy(), config, stop_ids=[STOP], max_context=CONTEXT, max_sequences=16)


def test_vllm_leaves_the_global_generators_and_threads_as_they_are() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    wanted = random.random(), np.random.random(), torch.rand(1).item(), torch.get_num_threads()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    _open().close()
    assert (random.random(), np.random.random(), torch.rand(1).item(), torch.get_num_threads()) == wanted


def test_vllm_that_cannot_start_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"(?s)engine.name=vllm: vLLM does not start with Qwen2.*memory"):
        _open(cpu_cache_gib=65536)


def test_what_vllm_cannot_compute_it_says_when_it_starts() -> None:
    config = EngineConfig("vllm", vllm=VllmConfig(cpu_cache_gib=0.25))
    with pytest.raises(ConfigError, match=r"(?s)vLLM does not start with Qwen2.*head_dim=16"):
        open_engine(policy(hidden_size=32), config, stop_ids=[STOP], max_context=CONTEXT, max_sequences=16)
    assert not dist.is_initialized()


def test_a_second_vllm_in_this_process_is_refused_until_the_first_is_closed() -> None:
    first = _open()
    try:
        with pytest.raises(ConfigError, match="wanted a process of its own"):
            _open()
        assert finish(first, request("a", (5, 6)))["a"].error is None
    finally:
        first.close()
    assert not dist.is_initialized()
    again = _open()
    assert finish(again, request("a", (5, 6)))["a"].error is None
    again.close()


def test_layers_that_vllm_does_not_know_are_refused_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = blank_adapter(policy(), LORA)
    foreign = {name.replace("q_proj", "novel_proj"): value for name, value in blank.weights.items()}
    monkeypatch.setattr("agentrl.scale.vllm_engine.blank_adapter", lambda *_: replace(blank, weights=foreign))
    config = EngineConfig("vllm", vllm=VllmConfig(cpu_cache_gib=0.25))
    with pytest.raises(ConfigError, match=r"(?s)engine\.vllm\.lora=merged\).*novel_proj"):
        open_engine(policy(), config, stop_ids=[STOP], max_context=CONTEXT, max_sequences=16, adapters=LORA)
    assert not dist.is_initialized()


def test_the_engine_of_an_actor_takes_adapters_when_it_starts_and_later() -> None:
    model, config = policy(), EngineConfig("vllm", vllm=VllmConfig(cpu_cache_gib=0.25))
    adapters = {version: random_adapter(model, version) for version in (1, 2)}
    spec = EngineSpec(strip_weights(model), config, (STOP,), CONTEXT, 16, (), LORA)
    host = EngineHost(spec, export_weights(model), 1, adapters[1])
    try:
        for version, adapter in adapters.items():
            if version == 2:
                host.refresh(None, version, adapter)
            asked = several(f"actor{version}-", None, 1.0)
            packed, replies = pack_requests(list(enumerate(asked))), {}
            while len(replies) < len(asked):
                done = unpack_generations(host.exchange([], packed, len(asked), 60.0))
                replies |= {reply.sequence: reply for _, reply in done}
                packed = pack_requests([])
            assert furthest(merged(model, adapter), asked, replies)[0] < 1e-3
            assert {reply.policy_version for reply in replies.values()} == {version}
    finally:
        host.close()
