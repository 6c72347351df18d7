"""vLLM in bfloat16 against a plain forward: `make test-vllm` runs these."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from vllm_cases import CONTEXT, MENU, STOP, apart, finish, furthest, needs_vllm, plain, policy, several

from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.scale.engines import open_engine

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    model = policy(dtype="bfloat16", initial_std=0.05)
    config = EngineConfig("vllm", vllm=VllmConfig(cpu_cache_gib=0.25))
    opened = open_engine(model, config, stop_ids=[STOP], max_context=CONTEXT, max_sequences=16)
    yield opened
    opened.close()


@pytest.mark.parametrize(("kind", "choices"), [("free", None), ("constrained", MENU)])
def test_in_bfloat16_they_are_those_of_a_plain_forward_too(engine: Any, kind: str, choices: Any) -> None:
    assert max(apart(engine, engine.model, kind, choices, 1.0)) < 2e-2


def test_where_bfloat16_rounds_more_vllm_is_no_further_from_float32_than_our_own_forward(
    engine: Any,
) -> None:
    kept = copy.deepcopy(engine.model.state_dict())
    try:
        engine.model.load_state_dict(policy(dtype="bfloat16").state_dict())
        engine.refresh(1)
        exact, asked = copy.deepcopy(engine.model).float(), several("sharp", None, 1.0)
        replies = finish(engine, *asked)
        theirs = furthest(exact, asked, replies)[0]
        ours = 0.0
        for each in asked:
            reply = replies[each.sequence]
            known, own = (plain(model, each.prompt_ids, reply)[0] for model in (exact, engine.model))
            ours = max([ours, *(abs(one - other) for one, other in zip(known, own, strict=True))])
        print(f"from float32, in bfloat16: vLLM {theirs:.2g}, our own forward {ours:.2g} nats")
        assert theirs < 1.5 * ours
    finally:
        engine.model.load_state_dict(kept)
        engine.refresh(0)
