"""Adapters in vLLM as vLLM's own, against a plain forward of merged weights: `make test-vllm` runs these."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_cases import (
    CONTEXT,
    LORA,
    MENU,
    STOP,
    apart,
    collected,
    finish,
    furthest,
    merged,
    needs_vllm,
    plain,
    policy,
    random_adapter,
    several,
    thoughtful,
)

from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.scale.engines import open_engine

pytestmark = needs_vllm


def _config(**more: Any) -> EngineConfig:
    return EngineConfig("vllm", vllm=VllmConfig(**{"cpu_cache_gib": 0.25} | more))


def _open() -> Any:
    return open_engine(
        policy(), _config(), stop_ids=[STOP], max_context=CONTEXT, max_sequences=48, adapters=LORA
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    opened = _open()
    yield opened
    opened.close()


@pytest.fixture
def engine(shared: Any) -> Iterator[Any]:
    """The shared engine, without sequences or an adapter, and with the weights that it began with."""
    yield shared
    for name in list(shared._sequences._held):
        shared.release(name)
    shared.model.load_state_dict(policy().state_dict())
    shared.refresh(0)


def _held(engine: Any) -> list[int]:
    (held,) = engine._llm.collective_rpc("list_loras")
    return sorted(held)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "choices"), [("free", None), ("constrained", MENU)])
def test_logprobs_and_entropies_under_an_adapter_are_those_of_merged_weights(
    engine: Any, kind: str, choices: Any, temperature: float
) -> None:
    adapter = random_adapter(engine.model, 0)
    engine.refresh(1, adapter)
    assert max(apart(engine, merged(engine.model, adapter), kind, choices, temperature)) < 1e-3
    asked = several("unmoved", choices, temperature)
    assert furthest(engine.model, asked, finish(engine, *asked), temperature)[0] > 0.1


def test_thoughts_before_a_choice_are_drawn_under_the_adapter(engine: Any) -> None:
    adapter = random_adapter(engine.model, 1)
    engine.refresh(1, adapter)
    thoughtful(engine, merged(engine.model, adapter))


def test_replies_in_flight_go_on_with_a_new_adapter_and_record_its_version(engine: Any) -> None:
    adapters = {version: random_adapter(engine.model, version) for version in (3, 5)}
    models = {version: merged(engine.model, adapter) for version, adapter in adapters.items()}
    engine.refresh(3, adapters[3])
    asked = several("r", None, 1.0)
    for each in asked:
        engine.submit(each)
    early = [reply for _ in range(4) for reply in engine.step()]
    engine.refresh(5, adapters[5])
    replies = {reply.sequence: reply for reply in early}
    replies |= collected(engine, len(asked) - len(early))
    crossed = [each for each in asked if set(replies[each.sequence].policy_versions) == {3, 5}]
    assert len(crossed) > 4
    for each in crossed:
        reply = replies[each.sequence]
        parts = {version: plain(model, each.prompt_ids, reply) for version, model in models.items()}
        for place, version in enumerate(reply.policy_versions):
            assert reply.logprobs[place] == pytest.approx(parts[version][0][place], abs=1e-3)
            assert reply.entropies[place] == pytest.approx(parts[version][1][place], abs=1e-3)
    later = several("l", MENU, 1.0)
    after = finish(engine, *later)
    assert furthest(models[5], later, after)[0] < 1e-3 < furthest(models[3], later, after)[0]
    assert {reply.policy_version for reply in after.values()} == {5}


def test_whole_weights_take_the_place_of_an_adapter_and_of_what_it_was_added_to(engine: Any) -> None:
    engine.refresh(1, random_adapter(engine.model, 1))
    asked = several("w", None, 1.0)
    for each in asked:
        engine.submit(each)
    early = [reply for _ in range(4) for reply in engine.step()]
    engine.model.load_state_dict(policy(seed=1).state_dict())
    engine.refresh(2)
    replies = collected(engine, len(asked) - len(early))
    late = {name: reply for name, reply in replies.items() if reply.policy_versions[-1:] == (2,)}
    assert len(late) > 4
    for each in asked:
        if (reply := late.get(each.sequence)) is not None:
            assert reply.logprobs[-1] == pytest.approx(
                plain(engine.model, each.prompt_ids, reply)[0][-1], abs=1e-3
            )
    adapter = random_adapter(engine.model, 2)
    engine.refresh(3, adapter)
    assert apart(engine, merged(engine.model, adapter), "after", None, 1.0)[0] < 1e-3


def test_vllm_holds_one_adapter_and_gets_the_whole_weights_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[int] = []
    monkeypatch.setattr(engine, "_copy_weights", lambda: whole.append(1))
    folder = Path(engine._folder.name)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    for version in range(12):
        engine.refresh(version, random_adapter(engine.model, version))
        finish(engine, *several(f"h{version}-", None, 1.0))
        assert _held(engine) == [1]
    assert whole == []
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == files


def test_vllm_that_was_started_again_has_the_adapter(engine: Any) -> None:
    adapter = random_adapter(engine.model, 4)
    engine.refresh(1, adapter)
    before = engine.restarts
    engine.submit(several("x", None, 1.0)[0])
    engine._llm.collective_rpc(_lose_the_model)
    assert [reply.lost for reply in engine.step()] == [True]
    assert engine.restarts == before + 1
    assert apart(engine, merged(engine.model, adapter), "again", None, 1.0)[0] < 1e-3


def _lose_the_model(worker: Any) -> None:
    worker.model_runner.model = None
