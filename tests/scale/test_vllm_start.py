"""Starting and closing vLLM in this process, one after the other: `make test-vllm` runs these."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from vllm_cases import CONTEXT, STOP, finish, needs_vllm, policy, request

from agentrl.errors import ConfigError
from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.scale.engines import open_engine

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
        _open(cpu_cache_gib=1e6)


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
