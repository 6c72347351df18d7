"""vLLM in this process against a plain forward and `TorchEngine`, for real: `make test-vllm` runs these."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from vllm_cases import (
    CONTEXT,
    MENU,
    STOP,
    apart,
    collected,
    finish,
    furthest,
    needs_vllm,
    plain,
    policy,
    request,
    several,
    thoughtful,
)

from agentrl.errors import AgentRLError
from agentrl.policy.settings import EngineConfig, VllmConfig
from agentrl.policy.torch_engine import TorchEngine
from agentrl.scale.engines import open_engine

pytestmark = needs_vllm


def _open(model: PreTrainedModel, **more: Any) -> Any:
    config = EngineConfig("vllm", vllm=VllmConfig(**{"cpu_cache_gib": 0.25} | more))
    return open_engine(model, config, stop_ids=[STOP], max_context=CONTEXT, max_sequences=48)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    opened = _open(policy(), max_restarts=1)
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "choices"), [("free", None), ("constrained", MENU)])
def test_logprobs_and_entropies_are_those_of_a_plain_forward(
    engine: Any, kind: str, choices: Any, temperature: float
) -> None:
    assert max(apart(engine, engine.model, kind, choices, temperature)) < 1e-3


def test_thoughts_are_drawn_freely_before_a_choice(engine: Any) -> None:
    thoughtful(engine, engine.model)


@pytest.mark.parametrize("choices", [None, MENU])
def test_greedy_replies_are_those_of_the_torch_engine(engine: Any, choices: Any) -> None:
    asked = several("g", choices, temperature=0.0)
    ours = finish(TorchEngine(engine.model, stop_ids=[STOP], max_context=CONTEXT), *asked)
    theirs = finish(engine, *asked)
    for name, reply in theirs.items():
        wanted = ours[name]
        assert (reply.token_ids, reply.allowed, reply.finish) == (
            wanted.token_ids,
            wanted.allowed,
            wanted.finish,
        )
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert reply.entropies == pytest.approx(wanted.entropies, abs=1e-4)


def test_sampled_choices_are_as_frequent_as_their_probabilities(engine: Any) -> None:
    prompt = (5, 6, 7, 8)
    asked = [request(f"s{seed}", prompt, choices=MENU[:3], seed=seed) for seed in range(600)]
    replies = [
        reply for start in range(0, 600, 16) for reply in finish(engine, *asked[start : start + 16]).values()
    ]
    first = [reply.token_ids[1] for reply in replies]
    logits = plain(engine.model, prompt, replies[0])[0][1]
    share = first.count(replies[0].token_ids[1]) / 600
    assert share == pytest.approx(np.exp(logits), abs=0.07)  # over three standard errors


def test_a_reply_depends_on_its_seed_and_not_on_the_batch(engine: Any) -> None:
    asked = several("a", None, 1.0)
    together = finish(engine, *asked)
    engine.release("a3")
    alone = finish(engine, asked[3])["a3"]
    assert alone.token_ids == together["a3"].token_ids
    others = finish(engine, *(request(f"o{seed}", asked[3].prompt_ids, seed=seed) for seed in range(8)))
    assert len({reply.token_ids for reply in others.values()}) > 4


def test_more_prompts_than_fit_into_a_step_take_several(engine: Any) -> None:
    prompts = [[5 + (seed + place) % 280 for place in range(CONTEXT - 8)] for seed in range(40)]
    asked = [request(f"p{seed}", prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    assert furthest(engine.model, asked, finish(engine, *asked))[0] < 1e-3
    assert engine.restarts == 0


def test_a_second_turn_goes_on_where_the_first_ended(engine: Any) -> None:
    prompt = tuple(range(5, 150))
    first = finish(engine, request("t", prompt, choices=MENU))["t"]
    second = finish(engine, request("t", (9, 8, 7), new_sequence=False, seed=1))["t"]
    before = [*prompt, *first.token_ids, 9, 8, 7]
    assert second.logprobs == pytest.approx(plain(engine.model, before, second)[0], abs=1e-3)
    again = finish(engine, request("t", (9, 8, 7), new_sequence=True, seed=1))["t"]
    assert again.logprobs == pytest.approx(plain(engine.model, (9, 8, 7), again)[0], abs=1e-3)


def test_replies_end_at_a_stop_id_at_their_limit_or_with_the_context(engine: Any) -> None:
    asked = [request(f"e{seed}", (5, 6, seed), seed=seed, max_tokens=60) for seed in range(16)]
    replies = finish(engine, *asked).values()
    assert {reply.finish for reply in replies} == {"stop", "length"}
    for reply in replies:
        assert STOP not in reply.token_ids[:-1]
        assert (reply.token_ids[-1] == STOP) == (reply.finish == "stop")
        assert reply.finish == "stop" or len(reply.token_ids) == 60
    last = finish(engine, request("full", [7] * (CONTEXT - 2), max_tokens=60))["full"]
    assert len(last.token_ids) <= 2
    over = finish(engine, request("over", [7] * CONTEXT))["over"]
    assert over.error == f"context overflow: {CONTEXT} tokens and a reply of 1 exceed max_context={CONTEXT}"
    assert not over.lost


def test_new_weights_are_written_in_place_and_replies_in_flight_go_on_with_them(engine: Any) -> None:
    old, new = copy.deepcopy(engine.model), policy(seed=1)
    asked = several("r", None, 1.0)
    for each in asked:
        engine.submit(each)
    early = [reply for _ in range(4) for reply in engine.step()]
    try:
        engine.model.load_state_dict(new.state_dict())
        engine.refresh(5)
        rest = collected(engine, len(asked) - len(early))
        replies = {reply.sequence: reply for reply in early} | rest
        crossed = [each for each in asked if replies[each.sequence].policy_versions]
        assert len(crossed) > 4
        for each in crossed:
            reply = replies[each.sequence]
            parts = {0: plain(old, each.prompt_ids, reply), 5: plain(new, each.prompt_ids, reply)}
            for place, version in enumerate(reply.policy_versions):
                assert reply.logprobs[place] == pytest.approx(parts[version][0][place], abs=1e-3)
                assert reply.entropies[place] == pytest.approx(parts[version][1][place], abs=1e-3)
        later = several("l", MENU, 1.0)
        after = finish(engine, *later)
        assert furthest(new, later, after)[0] < 1e-3 < furthest(old, later, after)[0]
        assert {reply.policy_version for reply in after.values()} == {5}
    finally:
        engine.model.load_state_dict(old.state_dict())
        engine.refresh(0)


def test_a_stop_id_inside_a_choice_does_not_end_it(engine: Any) -> None:
    menu = ((20, STOP, 22, STOP), (20, STOP, 31, STOP))
    replies = finish(engine, *several("i", menu, 2.0)).values()
    assert {reply.token_ids for reply in replies} == set(menu)


def test_a_released_sequence_gets_no_reply_and_others_go_on(engine: Any) -> None:
    engine.submit(request("gone", (5, 6), max_tokens=40))
    engine.step()
    engine.release("gone")
    engine.release("never heard of")
    assert set(finish(engine, request("here", (5, 6), max_tokens=40))) == {"here"}
    assert not engine.step()
    assert "unknown or released" in str(
        finish(engine, request("gone", (5,), new_sequence=False))["gone"].error
    )


def test_weights_that_are_not_finite_are_an_error_of_the_reply(engine: Any) -> None:
    kept = copy.deepcopy(engine.model.state_dict())
    try:
        with torch.no_grad():
            engine.model.model.norm.weight.fill_(float("nan"))
        engine.refresh(1)
        found = finish(engine, request("n", (5, 6)), request("m", (5, 6), choices=MENU))
        assert all("not finite" in str(reply.error) for reply in found.values())
    finally:
        engine.model.load_state_dict(kept)
        engine.refresh(0)
    assert finish(engine, request("n", (5, 6)))["n"].error is None


def _break(engine: Any) -> None:
    engine._llm.collective_rpc(_lose_the_model)


def _lose_the_model(worker: Any) -> None:
    worker.model_runner.model = None


def test_a_failure_is_the_replies_error_and_vllm_is_started_again_as_often_as_allowed(engine: Any) -> None:
    for each in (request("x", (5, 6)), request("y", (5, 6))):
        engine.submit(each)
    engine.step()
    _break(engine)
    lost = {reply.sequence: reply for reply in engine.step()}
    assert set(lost) == {"x", "y"}
    assert all(reply.lost and "vLLM failed" in str(reply.error) for reply in lost.values())
    assert engine.restarts == 1
    asked = several("again", None, 1.0)
    assert furthest(engine.model, asked, finish(engine, *asked))[0] < 1e-3
    _break(engine)
    engine.submit(request("z", (5, 6)))
    with pytest.raises(
        AgentRLError, match=r"vLLM failed 2 times, more than engine.vllm.max_restarts=1 allows"
    ):
        engine.step()
