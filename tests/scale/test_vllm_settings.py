"""Settings that are refused before vLLM starts or a server is contacted."""

import copy
import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm_cases import merged, policy, random_adapter

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl.learn.lora import adapter_weights, add_adapters, blank_adapter
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Adapter
from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.run.settings import load_config
from agentrl.scale.engines import check_engine
from agentrl.scale.vllm_lora import check_rank, room, write_adapter
from agentrl.scale.vllm_server import VllmServerEngine
from agentrl.training.launch import train


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("url=localhost", "engine.vllm.url is 'localhost', wanted \"http://host:port\""),
        ("url=http://localhost", "engine.vllm.url"),
        ("weights_folder=/tmp", "wanted engine.vllm.url as well"),
        ("gpu_memory_share=1.5", r"engine\.vllm\.gpu_memory_share: wrong value \(got 1.5"),
        ("cpu_cache_gib=0", r"engine\.vllm\.cpu_cache_gib: wrong value \(got 0,"),
        ("reply_timeout=-1", "engine.vllm.reply_timeout"),
        ("tensor_parallel_size=0", r"engine\.vllm\.tensor_parallel_size: wrong value \(got 0"),
        ("max_restarts=-1", "engine.vllm.max_restarts"),
        ("lora=no", r"engine\.vllm\.lora: "),
    ],
)
def test_wrong_settings_are_named(given: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_config(None, f"engine.vllm.{given}")


def test_every_engine_gives_exact_entropies() -> None:
    assert EngineConfig(name="vllm").provides == VllmServerEngine.provides == {"rollout:entropy"}


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set; modules whose names are added to it cannot be found."""
    names: set[str] = set()
    find = importlib.util.find_spec

    def found(name: str, *more: Any) -> Any:
        return None if name in names else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    return names


def test_without_vllm_the_command_that_installs_it_is_told(absent: set[str]) -> None:
    absent.add("vllm")
    with pytest.raises(MissingDependencyError, match=r"pip install -c constraints-vllm.txt -e '\.\[vllm\]'"):
        check_engine(EngineConfig(name="vllm"))


def test_a_server_needs_no_vllm_on_this_side(absent: set[str], tmp_path: Path) -> None:
    absent.add("vllm")
    check_engine(EngineConfig(name="vllm", vllm=VllmConfig("http://localhost:1", str(tmp_path))))
    absent.add("httpx2")
    with pytest.raises(MissingDependencyError, match="httpx2"):
        check_engine(EngineConfig(name="vllm", vllm=VllmConfig("http://localhost:1", str(tmp_path))))


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("config", "ranks", "wanted"),
    [
        (
            EngineConfig("vllm", vllm=VllmConfig(tensor_parallel_size=2)),
            1,
            "2, but this machine has 0 GPUs",
        ),
        (EngineConfig("vllm"), 2, "one of 2 ranks; set engine.actors"),
        (EngineConfig("vllm", vllm=VllmConfig("http://a:1")), 1, "by NCCL, but this machine has no GPU"),
        (EngineConfig("vllm", actors=2, vllm=VllmConfig("http://a:1", "/x")), 1, "wanted one of the two"),
        (
            EngineConfig("vllm", actors=2, actor_gpus=1, vllm=VllmConfig(tensor_parallel_size=2)),
            1,
            "engine.actor_gpus is 1, wanted at least engine.vllm.tensor_parallel_size=2",
        ),
    ],
)
def test_settings_that_cannot_be_had_together_are_refused(
    config: EngineConfig, ranks: int, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_engine(config, ranks=ranks)


def test_the_engine_of_this_process_is_never_refused() -> None:
    check_engine(EngineConfig(vllm=VllmConfig(tensor_parallel_size=8)), ranks=8)


def _connect(port: int) -> None:
    VllmServerEngine(policy(), VllmConfig(f"http://127.0.0.1:{port}", "/nowhere"), stop_ids=[4])


def test_nobody_at_the_url_is_one_error_with_the_command_that_starts_a_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"(?s)nothing answers at http://127.0.0.1:\d+.*vllm serve"):
            _connect(free.getsockname()[1])


def test_a_server_that_does_not_answer_is_found_before_a_folder_is_made(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"engine.vllm.url=http://127.0.0.1:{free.getsockname()[1]}"
        server = ("engine.name=vllm", url, f"engine.vllm.weights_folder={tmp_path}")
        runs = tmp_path / "runs"
        config = load_config(None, *server, f"run.folder={runs}")
        with pytest.raises(ConfigError, match="nothing answers"):
            train(config, quiet=True)
    assert not runs.exists()


class _Someone(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"data": [{"id": "gpt", "owned_by": "somebody"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def someone() -> Iterator[int]:
    """Serve something other than vLLM; return the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Someone) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_port_that_something_else_uses_is_one_error(someone: int) -> None:
    with pytest.raises(ConfigError, match=r"the server at http://127.0.0.1:\d+ is not a vLLM server"):
        _connect(someone)


def test_weights_go_by_nccl_from_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = EngineConfig("vllm", vllm=VllmConfig("http://a:1"))
    check_engine(config)
    with pytest.raises(ConfigError, match="from one process, but 2 share the run"):
        check_engine(config, ranks=2)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ((), False),
        (("name=vllm",), True),
        (("name=vllm", "actors=2"), True),
        (("name=vllm", "vllm.lora=merged"), False),
        (("name=vllm", "vllm.url=http://a:1"), False),  # weights go by NCCL, adapters through a folder
        (("name=vllm", "vllm.url=http://a:1", "vllm.weights_folder=/x"), True),
    ],
)
def test_vllm_takes_adapters_unless_it_is_told_not_to_or_has_no_folder(
    given: tuple[str, ...], taken: bool
) -> None:
    config = load_config(None, *(f"engine.{each}" for each in given), "learner.lora.rank=600")
    assert config.engine.takes_adapters == taken
    refused = pytest.raises(
        ConfigError, match=r"rank is 600, wanted at most 512 .* engine\.vllm\.lora=merged"
    )
    with refused if taken else nullcontext():
        check_rank(config.engine, config.largest_adapters)


def test_one_slot_holds_the_adapters_of_both_stages() -> None:
    lora = (
        "learner.lora={rank: 4, targets: [q_proj]}",
        "warm_start.learner.lora={rank: 9, targets: [up_proj]}",
    )
    both = load_config(None, *lora).largest_adapters
    assert both is not None
    assert (both.rank, set(both.targets), room(both)) == (9, {"q_proj", "up_proj"}, 16)
    alone = load_config(None, *lora, "warm_start.steps=0").largest_adapters
    assert alone is not None
    assert (alone.rank, alone.targets, room(alone)) == (4, ("q_proj",), 8)
    assert load_config(None).largest_adapters is None


def test_a_blank_adapter_has_the_names_and_shapes_of_those_that_are_learned() -> None:
    pytest.importorskip("peft")
    model, config = policy(), LoraConfig(rank=3, targets=("q_proj", "down_proj"))
    blank = blank_adapter(model, config)
    add_adapters(model, config)
    learned = adapter_weights(model)
    assert {name: value.shape for name, value in blank.weights.items()} == {
        name: value.shape for name, value in learned.items()
    }
    assert not any(value.any() for value in blank.weights.values())


def test_the_folder_that_vllm_reads_holds_for_peft_what_merging_adds(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = policy()
    adapter = random_adapter(model, 0)
    write_adapter(adapter, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).merge_and_unload()
    found, wanted = dict(loaded.named_parameters()), dict(merged(model, adapter).named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    rounded = Adapter({name: value.bfloat16() for name, value in adapter.weights.items()}, 3, 6.0)
    write_adapter(rounded, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
