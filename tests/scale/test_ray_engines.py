"""Engines in Ray actors generate what an engine in this process does, and lost requests can be repeated."""

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from shelves import Shelves

from agentrl.data.trajectory import StopReason
from agentrl.errors import AgentRLError, ConfigError, MissingDependencyError
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.engine import Engine, Generation, GenerationRequest, SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import EngineConfig, PolicyConfig
from agentrl.policy.thinking import Ending, Thinking
from agentrl.policy.tokens import fit_tokenizer, make_dialogue
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import LanguagePlayer
from agentrl.scale.engine_host import (
    EngineHost,
    EngineSpec,
    export_weights,
    load_weights,
    restore_model,
    strip_weights,
)
from agentrl.scale.engines import open_engine
from agentrl.scale.messages import pack_requests, unpack_generations

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from agentrl.scale import cluster, ray_engines  # noqa: E402
from agentrl.scale.ray_engines import RayEngines  # noqa: E402

LIMITS: dict[str, Any] = {"max_context": 256, "max_sequences": 64}


TEXTS = ["5 shelves", "go on: 4 left", "take mug: 3 left", "take pen: 2 left"]


@cache
def tokenizer() -> Any:
    return fit_tokenizer(TEXTS * 4, 320)


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    return make_dialogue(tokenizer())


def policy(seed: int = 0, dtype: Any = "float32") -> Any:
    config = PolicyConfig(device="cpu", max_context=256, initial_std=0.1, dtype=dtype)
    return build_model(config, tokenizer(), seed)


@pytest.fixture(scope="module")
def engines(ray_is_there: None, dialogue: Dialogue) -> Iterator[RayEngines]:
    torch.set_num_threads(1)
    engines = RayEngines(policy(), EngineConfig(actors=2), stop_ids=dialogue.stop_ids, address=None, **LIMITS)
    yield engines
    engines.close()


@pytest.fixture(autouse=True)
def _no_sequence_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engines" in request.fixturenames:
        kept = request.getfixturevalue("engines")
        for name in list(kept._host_of):
            kept.release(name)


def ask(name: str, ids: Sequence[int], *, new_sequence: bool = True, **more: Any) -> GenerationRequest:
    settings = {"choices": None, "seed": len(name) + sum(map(ord, name)), "sampling": SamplingParams(1.0, 12)}
    return GenerationRequest(name, tuple(ids), new_sequence, **(settings | more))


def replies(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, Generation]:
    for request in requests:
        engine.submit(request)
    found: dict[str, Generation] = {}
    while len(found) < len(requests):
        found |= {generation.sequence: generation for generation in engine.step()}
    return found


def assert_same(found: Generation, expected: Generation) -> None:
    assert (found.token_ids, found.allowed) == (expected.token_ids, expected.allowed)
    assert (found.finish, found.policy_version) == (expected.finish, expected.policy_version)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert found.entropies == pytest.approx(expected.entropies, abs=1e-5)


def test_replies_are_those_of_engines_here(engines: RayEngines, dialogue: Dialogue) -> None:
    """Each actor gets its half of the sequences in one message, like the two engines here."""
    menu = tuple(dialogue.encode_reply(text) for text in ("go on", "take mug", "take pen"))
    names = [f"s{number}" for number in range(8)]
    first = [ask(name, [5, 6, 7 + at], choices=menu if at % 3 else None) for at, name in enumerate(names)]
    second = [ask(name, [8, 9], new_sequence=False) for name in names]
    here = [TorchEngine(engines._model, stop_ids=dialogue.stop_ids, **LIMITS) for _ in range(2)]
    for requests in (first, second):
        expected = replies(here[0], requests[::2]) | replies(here[1], requests[1::2])
        found = replies(engines, requests)
        assert found.keys() == set(names)
        for name in names:
            assert_same(found[name], expected[name])
    assert {len(host.sequences) for host in engines._hosts} == {4}


def test_thoughts_before_a_choice_are_those_of_engines_here(engines: RayEngines, dialogue: Dialogue) -> None:
    menu = tuple(dialogue.encode_reply(text) for text in ("go on", "take mug", "take pen"))
    ending = Ending("!", dict.fromkeys(range(50, 90), "!"))
    thinking = Thinking((), ending, (50,), {"": (6, 7)})
    more = {"choices": menu, "thinking": thinking, "sampling": SamplingParams(1.0, 24)}
    requests = [ask(f"t{number}", [5, 6, 7 + number], **more) for number in range(8)]
    here = [TorchEngine(engines._model, stop_ids=dialogue.stop_ids, **LIMITS) for _ in range(2)]
    expected = replies(here[0], requests[::2]) | replies(here[1], requests[1::2])
    found = replies(engines, requests)
    for name, wanted in expected.items():
        assert wanted.allowed is not None
        assert wanted.allowed[0] is None
        assert_same(found[name], wanted)


def test_all_actors_take_up_new_weights(engines: RayEngines, dialogue: Dialogue) -> None:
    own, other = engines._model, policy(seed=1)
    before = export_weights(own)
    requests = [ask(name, [5, 6, 7]) for name in ("x", "y")]
    old = replies(engines, requests)
    own.load_state_dict(other.state_dict())
    engines.refresh(4)
    here = TorchEngine(other, stop_ids=dialogue.stop_ids, **LIMITS)
    here.refresh(4)
    expected, found = replies(here, requests), replies(engines, requests)
    for name in ("x", "y"):
        assert_same(found[name], expected[name])
        assert found[name].logprobs != old[name].logprobs
    load_weights(dict(own.named_parameters()), before)
    engines.refresh(0)


def test_what_is_wrong_with_a_request_comes_back(engines: RayEngines) -> None:
    found = replies(engines, [ask("n", [5], new_sequence=False), ask("o", [5] * 300), ask("p", [5])])
    assert "'n' is unknown" in str(found["n"].error)
    assert "context overflow" in str(found["o"].error)
    assert (found["p"].error, found["n"].lost) == (None, False)
    engines.submit(ask("p", [5], new_sequence=False))
    engines.submit(ask("p", [5], new_sequence=False))
    (twice,) = engines.step()[:1]
    assert "'p' has a request in flight" in str(twice.error)


def test_nothing_is_returned_of_what_was_released(engines: RayEngines) -> None:
    expected = replies(engines, [ask("q", [9, 8])])["q"]
    engines.release("q")
    for _ in range(2):
        engines.submit(ask("q", [5, 6, 7]))
    assert [generation.error is None for generation in engines.step()] == [False]  # the reply is on its way
    engines.release("q")
    found = replies(engines, [ask("q", [9, 8]), ask("r", [9])])
    assert_same(found["q"], expected)


def test_who_has_a_parent_goes_where_it_is(engines: RayEngines) -> None:
    replies(engines, [ask("a", [5, 6]), ask("b", [5, 6])])
    replies(engines, [ask("c", [5, 6, 7], parent="b"), ask("d", [5, 6, 7], parent="b")])
    where = engines._host_of
    assert where["c"] is where["d"] is where["b"] is not where["a"]


def test_32_sequences_need_one_message_for_ten_replies(
    engines: RayEngines, dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engines, "_MAX_WAIT", 60.0)  # so that the result does not depend on speed
    menu = tuple(dialogue.encode_reply(text) for text in ("go on", "take mug"))
    before, answered = engines.messages, 0
    for number in range(32):
        engines.submit(ask(f"s{number}", [5, 6], choices=menu))
    while answered < 640:
        for generation in engines.step():
            answered += 1
            engines.submit(ask(generation.sequence, [7], choices=menu))
    assert (engines.messages - before) * 10 <= answered


def test_more_than_the_cluster_has_is_refused_in_one_line(ray_is_there: None, dialogue: Dialogue) -> None:
    config = EngineConfig(actors=2, actor_gpus=1000)
    with pytest.raises(ConfigError, match=r"^engine.actors is 2, each with 1000 GPUs, wanted at most 0: .*$"):
        RayEngines(policy(), config, stop_ids=dialogue.stop_ids, **LIMITS)


@pytest.mark.parametrize("asked", [{"actor_gpus": 1000}, {"actor_cpus": 1000}])
def test_more_than_this_machine_has_is_refused_without_starting_ray(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "connected", None)
    with pytest.raises(ConfigError, match=r"^engine.actors is 2, each with 1000 .PUs, wanted at most 0: .*$"):
        cluster.check_actors(EngineConfig(actors=2, **asked), None)
    cluster.check_actors(EngineConfig(), None)
    cluster.check_actors(EngineConfig(actors=64), None)


def test_without_ray_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"engine.actors=2 needs Ray: pip install -e '\.\[ray"):
        open_engine(policy(), EngineConfig(actors=2), stop_ids=dialogue.stop_ids, **LIMITS)


@pytest.mark.parametrize("wrong", [{"actors": 0}, {"actor_cpus": -1}, {"actor_restarts": -1}])
def test_numbers_below_their_least_are_refused(wrong: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"engine.{next(iter(wrong))}: wrong value \(got -?[01], wanted at least"
    ):
        EngineConfig(**wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_travels_without_its_weights_and_gets_them_back(dtype: str) -> None:
    model = policy(dtype=dtype)
    travelling = strip_weights(model)
    assert len(travelling) < 20_000 < sum(each.nbytes for each in export_weights(model).values())
    _, again = restore_model(travelling, export_weights(model), torch.device("cpu"))
    assert again.config.to_dict() == model.config.to_dict()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight  # tied, as they were
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_exchange_ends_with_enough_replies(dialogue: Dialogue) -> None:
    model = policy()
    spec = EngineSpec(strip_weights(model), EngineConfig(), tuple(dialogue.stop_ids), 256, 8, [])
    host = EngineHost(spec, export_weights(model), 3)
    limits = [1, 1, 1, 6, 6]
    asked = [
        (number, ask(str(number), [5], sampling=SamplingParams(1.0, limit)))
        for number, limit in enumerate(limits)
    ]
    found = unpack_generations(host.exchange([], pack_requests(asked), 16, 60.0))
    assert [number for number, _ in found] == [0, 1, 2]  # three of four, and of those there are five
    assert {generation.policy_version for _, generation in found} == {3}
    (one,) = unpack_generations(host.exchange(["3"], pack_requests([]), 16, 60.0))
    assert one[0] == 4


class Killing(LanguagePlayer):
    """Kills an actor at its tenth poll."""

    polls = 0

    def poll(self) -> Any:
        self.polls += 1
        if self.polls == 10:
            ray.kill(self._engine._hosts[0].actor)  # type: ignore[attr-defined]
        return super().poll()


@pytest.mark.slow
def test_episodes_of_an_actor_that_is_lost_are_played_again_and_nobody_is_blamed(
    ray_is_there: None, dialogue: Dialogue
) -> None:
    config = EngineConfig(actors=2, actor_restarts=1)
    engines = RayEngines(policy(), config, stop_ids=dialogue.stop_ids, **LIMITS)
    player = Killing(dialogue, engines, SamplingParams(1.0, 8))
    specs = [EpisodeSpec(f"e{number}", "test/Shelves-v0", "6", number) for number in range(12)]
    found = collect(specs, player, EnvironmentPool(Shelves), max_active=6, max_attempts=1)
    assert {episode.stop for episode in found.episodes} == {StopReason.TERMINATED}
    assert 1 <= len(found.failures) <= 6
    assert {failure.stop for failure in found.failures} == {StopReason.ENGINE_ERROR}
    assert all("its actor was lost" in str(failure.error) for failure in found.failures)
    assert (engines.restarts, len(engines._hosts)) == (1, 2)
    engines.close()


@pytest.mark.slow
def test_a_sequence_learns_of_its_loss_and_the_last_actor_is_replaced_as_often_as_was_allowed(
    ray_is_there: None, dialogue: Dialogue
) -> None:
    config = EngineConfig(actors=1, actor_restarts=1)
    engines = RayEngines(policy(), config, stop_ids=dialogue.stop_ids, **LIMITS)
    replies(engines, [ask("a", [5, 6])])
    ray.kill(engines._hosts[0].actor)
    assert replies(engines, [ask("b", [5, 6])])["b"].lost
    again = replies(engines, [ask("a", [7], new_sequence=False), ask("b", [5, 6])])
    assert (again["a"].lost, again["b"].error) == (True, None)
    ray.kill(engines._hosts[0].actor)
    with pytest.raises(AgentRLError, match=r"the last one, and engine.actor_restarts=1 replacements"):
        replies(engines, [ask("c", [7])])
    engines.close()
