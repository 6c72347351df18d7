"""T2PO: the uncertainty of tokens and turns, and what it decides in the rollout."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agentrl.algorithms.algorithm import check_requirements
from agentrl.algorithms.functional import is_flat, token_uncertainty, turn_uncertainty
from agentrl.algorithms.hooks import Context, MiniBatch, ReplyState, SampledReply, Verdict
from agentrl.algorithms.recipe import build_recipe, recipe_tree
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError, RequirementError
from agentrl.policy.settings import EngineConfig

CONTEXT = Context(vocabulary=4)
SHARES = ([0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01])
ENTROPIES = [-sum(p * math.log(p) for p in row) for row in SHARES]
CONFIDENCES = [-sum(math.log(p) for p in row) / 4 for row in SHARES]


def uncertainty_of(entropies: Sequence[float], confidences: Sequence[float]) -> Tensor:
    return token_uncertainty(
        torch.tensor(entropies, dtype=torch.float64),
        torch.tensor(confidences, dtype=torch.float64),
        entropy_weight=0.5,
        vocabulary=4,
    )


def state(previous: dict[str, Any] | None) -> ReplyState:
    turn = None if previous is None else Turn("o", "a", info=previous)
    return ReplyState("t", "e", 0, 0 if turn is None else 1, turn, 1.0)


@pytest.mark.vector("T2PO-1")
def test_the_uncertainty_of_three_tokens_and_their_turn() -> None:
    assert pytest.approx([1.386294, 1.816108, 3.461492], abs=5e-7) == CONFIDENCES
    found = uncertainty_of(ENTROPIES, CONFIDENCES)
    assert found.tolist() == pytest.approx([1, 0.735635, 0.060485], abs=5e-7)
    assert found.diff().abs().tolist() == pytest.approx([0.264365, 0.675150], abs=5e-7)
    assert turn_uncertainty(found) == pytest.approx(0.354354, abs=5e-7)


@pytest.mark.vector("T2PO-1")
def test_a_turn_is_refused_if_its_uncertainty_is_that_of_the_turn_before(build) -> None:
    plan = build("t2po", change=0.1).rollout
    assert plan.turn_gate is not None
    reply = SampledReply(ENTROPIES, CONFIDENCES)
    score = pytest.approx(0.354354, abs=5e-7)
    assert plan.turn_gate(state(None), reply, CONTEXT) == Verdict(True, score)
    for before, accepted in ((0.354354, False), (0.26, False), (0.44, False), (0.25, True), (0.46, True)):
        verdict = plan.turn_gate(state({"gate_score": before}), reply, CONTEXT)
        assert verdict == Verdict(accepted, score)
    # A turn that was played before the gate was there has no score to compare with.
    assert plan.turn_gate(state({}), reply, CONTEXT).accept


def test_confidences_that_are_all_equal_leave_the_entropy_alone_to_differ() -> None:
    found = uncertainty_of([0.0, math.log(4)], [2.0, 2.0])
    assert found.tolist() == pytest.approx([0.5, 1.0])
    assert turn_uncertainty(uncertainty_of([], [])) == 0.0
    assert turn_uncertainty(torch.tensor([0.0, 1.0], dtype=torch.float64)) == pytest.approx(1e-6)


def test_uncertainty_is_flat_where_its_mean_step_over_the_window_is_small() -> None:
    steps = torch.tensor([0.9, 0.5, 0.52, 0.5, 0.51])
    assert is_flat(steps, window=3, threshold=0.02)
    assert not is_flat(steps, window=3, threshold=0.016)
    assert not is_flat(steps, window=4, threshold=0.02)
    assert not is_flat(steps[-3:], window=3, threshold=1.0)


def test_reasoning_ends_only_once_it_is_long_enough() -> None:
    plan = build_recipe("t2po", {"least_thoughts": 6, "window": 3, "flat": 0.01}).build().rollout
    ends = plan.end_thoughts
    assert ends is not None
    levels = [(1.0, 3.0), (0.2, 1.0), *[(0.6, 2.0)] * 9]
    found = [ends(*zip(*levels[:count], strict=True), CONTEXT) for count in range(1, len(levels) + 1)]
    assert found == [False] * 5 + [True] * 6
    assert not ends([], [], CONTEXT)


def test_with_both_off_it_is_its_base_and_each_alone_asks_for_its_part() -> None:
    off = build_recipe("t2po", {"flat": 0.0, "change": 0.0}).build()
    plain = build_recipe("gigpo").build()
    assert off.rollout == plain.rollout
    assert off.requires == plain.requires
    assert off.advantage.func is plain.advantage.func
    gate = build_recipe("t2po", {"flat": 0.0}).build().rollout
    assert (gate.end_thoughts, gate.resamples, gate.confidence) == (None, 2, 10)
    thoughts = build_recipe("t2po", {"resamples": 0, "top": 5}).build().rollout
    assert (thoughts.turn_gate, thoughts.confidence) == (None, 5)


@pytest.mark.parametrize("settings", [{}, {"flat": 0.0}, {"change": 0.0}])
@pytest.mark.parametrize("engine", [EngineConfig(name="vllm"), EngineConfig(actors=2)])
def test_an_engine_that_measures_no_confidence_is_refused(
    settings: dict[str, float], engine: EngineConfig
) -> None:
    algorithm = build_recipe("t2po", settings).build()
    assert "rollout:confidence" in algorithm.requires
    learner = {"old_logprobs", "entropy", "current"}
    check_requirements(algorithm, learner | EngineConfig().provides)
    with pytest.raises(RequirementError, match=r"without engine\.actors measures it"):
        check_requirements(algorithm, learner | engine.provides)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ({"name": "aepo"}, "base 'aepo' branches"),
        ({"name": "appo"}, "base 'appo' branches"),
        ({"name": "t2po"}, "base 't2po' decides which replies are played"),
    ],
)
def test_a_base_that_decides_the_rollout_itself_is_refused(base: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_recipe("t2po", {"base": base}).build()


def test_what_is_logged_of_the_replies() -> None:
    metrics = build_recipe("t2po").build().diagnostics[-1]

    def turn(**info: Any) -> Turn:
        return Turn("o", "a", (1,), (2,), (-0.5,), (0.5,), new_sequence=True, info=info)

    turns = (
        turn(gate_score=0.2),
        turn(gate_score=0.4, discarded_replies=2, discarded_tokens=9, intervened=True),
        turn(),
        turn(intervened=True),
    )
    batch = collate([Group("t", (Episode("e", "env", "t", 0, turns, StopReason.TERMINATED),))])
    assert metrics(MiniBatch(batch, batch.logprobs), CONTEXT) == {
        "t2po/intervened": 0.5,
        "t2po/resampled": 0.25,
        "t2po/discarded_replies": 0.5,
        "t2po/discarded_tokens": 9 / 4,
        "t2po/uncertainty": pytest.approx(0.3),
    }
    empty = collate([])
    assert metrics(MiniBatch(empty, empty.logprobs), CONTEXT) == {}


def test_a_configuration_is_read_and_written_back() -> None:
    made = build_recipe("t2po", {"preset": "released", "top": 5})
    assert (made.flat, made.change) == (0.0, 0.3)
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made
