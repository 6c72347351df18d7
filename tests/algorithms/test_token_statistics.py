"""Statistics that components ask for by name: their values, and what is refused before the first rollout."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from agentrl.algorithms import token_statistics
from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.algorithms.hooks import Outputs, Term, requirements, requires, token_statistic
from agentrl.algorithms.token_statistics import (
    current_statistics,
    loss_statistics,
    scored_statistics,
    sequence_statistic,
    statistic,
)
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.learner import provided
from agentrl.planning.preflight import check_algorithm
from agentrl.policy.settings import EngineConfig

DOUBLE = torch.float64
NEVER = -math.inf


@pytest.fixture
def registry(monkeypatch):
    """Leave no statistic of a test registered."""
    monkeypatch.setattr(
        token_statistics._functions, "_functions", dict(token_statistics._functions._functions)
    )


def found(name, logits, token=0):
    """The statistic of one token with these logits."""
    function = current_statistics([name]).of_logits[name]
    values = function(torch.tensor([logits], dtype=DOUBLE), torch.tensor([token]))
    assert values.dtype == DOUBLE
    return values[0].tolist()


def logs(*probabilities):
    return [math.log(p) if p else NEVER for p in probabilities]


def test_topk_is_sorted_and_padded_with_probability_0():
    assert found("topk:2", logs(0.2, 0.5, 0.3)) == pytest.approx([0.5, 0.3])
    assert found("topk:5", logs(0.2, 0.5, 0.3)) == pytest.approx([0.5, 0.3, 0.2, 0, 0])
    assert found("topk:3", logs(0.4, 0, 0.6)) == pytest.approx([0.6, 0.4, 0])


def test_top_p_entropy_drops_the_token_that_crosses_p_or_keeps_it():
    # Cumulative: .4, .7, .9, 1. Below .8 are two tokens, q = 4/7, 3/7; with the third q = 4/9, 3/9, 2/9.
    two = -(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7))
    three = -(4 / 9 * math.log(4 / 9) + 3 / 9 * math.log(3 / 9) + 2 / 9 * math.log(2 / 9))
    logits = logs(0.1, 0.4, 0.2, 0.3)
    assert found("top_p_entropy:0.8", logits) == pytest.approx(two)
    assert found("top_p_entropy_inclusive:0.8", logits) == pytest.approx(three)
    assert found("top_p_entropy:0.8", logs(0.9, 0.1)) == 0  # none is kept
    assert found("top_p_entropy_inclusive:0.8", logs(0.9, 0.1)) == pytest.approx(0, abs=1e-15)  # one is


def test_with_all_the_mass_top_p_entropy_is_the_entropy():
    wanted = 1.5 * math.log(2)
    assert found("top_p_entropy_inclusive:1", logs(0.5, 0.25, 0, 0.25)) == pytest.approx(wanted)


def test_log_z_minp_gives_lp_regs_proxy():
    logits = [3, 2, 0.5, -1, -3]  # p = .679921, .250129, .055811, .012453, .001685; kept from .013598 on
    log_z = found("log_z_minp:0.02", logits)
    logprob = found("logprob_at:1", logits, token=2)
    assert log_z == pytest.approx(math.log(1 - 0.012453 - 0.001685), abs=1e-6)
    assert logprob == pytest.approx(-2.885778, abs=1e-6)
    gap = -log_z
    assert logprob + gap == pytest.approx(-2.871539, abs=1e-6)
    assert math.exp(gap) - gap - 1 == pytest.approx(1.0186e-4, abs=1e-8)
    assert 1 - math.exp(gap) == pytest.approx(-0.014341, abs=1e-6)
    assert [found("in_minp:0.02", logits, token=token) for token in range(5)] == [1, 1, 1, 0, 0]


def test_entropy_change_is_the_first_order_change_by_a_step_on_the_logits():
    # p = 1/2, 1/4, 1/4: H = 1.5 ln 2; (1/4 * .5 - 2 * 1/16 * .5) ln 2 = ln 2 / 16
    assert found("entropy_change", logs(0.5, 0.25, 0.25)) == pytest.approx(math.log(2) / 16)
    logits = torch.tensor([2, 1, 0, -1], dtype=DOUBLE)
    p, step = logits.softmax(0), 1e-6
    entropy = -(p * p.log()).sum()
    moved = (logits + step * (torch.eye(4, dtype=DOUBLE)[1] - p)).softmax(0)
    change = -(moved * moved.log()).sum() - entropy
    wanted = found("entropy_change", logits.tolist()) - float(p[1] * (p[1].log() + entropy))
    assert float(change) / step == pytest.approx(wanted, abs=1e-6)


def test_logprob_at_a_second_temperature_gives_dcpos_advantages():
    logits = [2, 1, 0, -1]
    a = 0.242424
    advantages = [
        (1 - a) * 1.2
        + a * math.exp(found("logprob_at:1.2", logits, token=t) - found("logprob_at:1", logits, token=t))
        for t in range(4)
    ]
    assert advantages == pytest.approx([1.129831, 1.169865, 1.217159, 1.273030], abs=2e-6)


@pytest.mark.parametrize(
    "name",
    [
        "topk:3",
        "top_p_entropy:0.8",
        "top_p_entropy_inclusive:1",
        "log_z_minp:0.02",
        "entropy_change",
        "logprob_at:1.2",
    ],
)
def test_a_forbidden_token_is_as_if_it_were_not_there_in_value_and_gradient(name):
    function = current_statistics([name]).of_logits[name]
    results = []
    for columns in ([0, 1, 2, 3], [0, 1, 2]):
        logits = torch.tensor([[1.0, 0.3, 0.0, NEVER]], dtype=DOUBLE)[:, columns].requires_grad_()
        values = function(logits, torch.tensor([1]))
        (slope,) = torch.autograd.grad(values.sum(), logits)
        results.append((values.detach(), slope[:, :3]))
        assert slope.isfinite().all()
    for with_it, without in zip(*results, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-12)


def two_turns(layout):
    first = Turn("o", "a", (1, 2), (3, 4), new_sequence=True)
    second = Turn("o", "a", (5,), (6,))
    other = Turn("o", "a", (1,), (7, 8), (), new_sequence=True)
    episodes = (
        Episode("e", "env", "t", 0, (first, second), StopReason.TERMINATED),
        Episode("f", "env", "t", 0, (other,), StopReason.TERMINATED),
    )
    return collate([Group("t", episodes)], layout=layout)


@pytest.mark.parametrize("layout", ["turn", "trajectory"])
def test_sequence_logprobs_are_sums_over_a_turn_or_a_trajectory_in_both_layouts(layout):
    batch = two_turns(layout)
    logprobs = torch.where(batch.action_mask, -batch.tokens / 10, math.nan)
    asked = current_statistics(["sequence_logprob", "sequence_logprob:trajectory"]).of_logprobs
    of_token = {
        name: {
            int(token): round(float(value), 6)
            for token, value in zip(batch.tokens[batch.action_mask], values[batch.action_mask], strict=True)
        }
        for name, function in asked.items()
        if not (values := function(logprobs, batch))[~batch.action_mask].any()
    }
    assert of_token == {
        "sequence_logprob": {3: -0.7, 4: -0.7, 6: -0.6, 7: -1.5, 8: -1.5},
        "sequence_logprob:trajectory": {3: -1.3, 4: -1.3, 6: -1.3, 7: -1.5, 8: -1.5},
    }


# Requirements


def term(*names):
    @requires(*names)
    def loss(outputs, mini, context):
        return outputs.logprobs

    return Algorithm(terms=(Term("siren", loss, 1.0),))


LEARNER = provided(reference=False, critic=False)


@pytest.mark.parametrize(
    "name",
    [
        "topk:10",
        "top_p_entropy:0.8",
        "log_z_minp:0.02",
        "in_minp:0.02",
        "entropy_change",
        "logprob_at:1.2",
        "sequence_logprob",
        "sequence_logprob:turn",
    ],
)
def test_a_learner_provides_statistics_with_and_without_gradient(name):
    check_requirements(term(name, f"{name}:grad"), LEARNER)
    with pytest.raises(
        RequirementError, match=f"terms/siren requires {name}; this run provides old_logprobs$"
    ):
        check_requirements(term(name), {"old_logprobs"})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("top_p_entropy:1.4", r"top_p_entropy:1.4 \(p: input should be less than 1\)"),
        ("top_p_entropy:nan:grad", r"top_p_entropy:nan:grad \(p: input should be a finite number\)"),
        ("topk:0", r"topk:0 \(k: input should be greater than or equal to 1\)"),
        ("topk:ten", r"topk:ten \(k: input should be a valid integer"),
        ("topk", r"topk \(it needs an argument: topk:K\)"),
        ("topk:grad", r"topk:grad \(it needs an argument: topk:K\)"),
        ("entropy_change:2", r"entropy_change:2 \(entropy_change takes no argument\)"),
        ("top_k:10", r"top_k:10 \(did you mean topk:K\?\)"),
        ("sequence_logprob:batch", r"\(sequence: input should be 'turn' or 'trajectory'\)"),
        ("sequence_logprob:trajectory:grad", r"\(it has no gradient: a trajectory's rows may be in several"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_slot_and_name_with_the_reason(name, why):
    with pytest.raises(RequirementError, match=f"algorithm: terms/siren requires .*{why}"):
        check_algorithm(term("entropy_change", name), EngineConfig())


def test_the_message_about_an_unknown_name_lists_the_statistics():
    with pytest.raises(
        RequirementError,
        match=r"siren requires embeddings; this run provides .*old_logprobs.*, and of each token .*topk:K$",
    ):
        check_algorithm(term("embeddings"), EngineConfig())


def test_each_pass_computes_what_its_readers_ask_for():
    def names(statistics):
        return [*statistics.of_logits, *statistics.of_logprobs]

    asked = {"topk:2", "entropy_change:grad", "sequence_logprob:grad", "old_logprobs", "entropy:grad"}
    assert names(scored_statistics(asked)) == ["topk:2"]
    assert names(loss_statistics(asked)) == ["entropy_change", "sequence_logprob"]
    assert names(current_statistics(asked)) == ["entropy_change", "topk:2", "sequence_logprob"]
    # The scoring pass stands for `current` in the first mini-batch.
    assert names(scored_statistics(asked | {"current"})) == names(current_statistics(asked))
    assert term("topk:2").reads_scores
    assert not term("topk:2:grad").reads_scores


@pytest.mark.usefixtures("registry")
def test_one_function_adds_a_statistic():
    @statistic("top_probability")
    def top_probability(logits, tokens):
        return logits.softmax(dim=-1).amax(dim=-1)

    check_algorithm(term("top_probability"), EngineConfig())
    assert found("top_probability", logs(0.3, 0.7)) == pytest.approx(0.7)
    statistic("top_probability")(top_probability)  # a module that is imported twice
    with pytest.raises(
        ConfigError, match=r"two statistics are named 'topk': .*top_probabilities and .*other"
    ):

        @statistic("topk")
        def other(logits, tokens):
            return logits[:, 0]


@pytest.mark.usefixtures("registry")
def test_a_statistic_of_another_shape_is_refused_before_the_first_rollout():
    statistic("mean")(lambda logits, tokens: logits.mean())
    sequence_statistic("whole")(lambda logprobs, batch: logprobs)
    check_algorithm(term("whole"), EngineConfig())
    with pytest.raises(RequirementError, match=r"mean \(it returned shape \(\) for 2 tokens, wanted \[N\]"):
        check_algorithm(term("mean"), EngineConfig())


def test_a_name_may_depend_on_a_hyper_parameter():
    class Method:
        def __init__(self, p):
            self.p = p

        @requires("entropy")
        def loss(self, outputs, mini, context):
            return outputs.logprobs * self.p

    def hook(mini, context, p):
        return mini.advantages

    few, many = Method(0.2), Method(0.8)
    marked = requires(f"top_p_entropy:{few.p}")(few.loss)
    assert requirements(marked) == {"entropy", "top_p_entropy:0.2"}
    assert requirements(many.loss) == {"entropy"}
    assert marked(Outputs(torch.ones(1), torch.ones(1)), None, None).item() == pytest.approx(0.2)
    assert requirements(requires("topk:3")(partial(hook, p=1))) == {"topk:3"}
    assert requirements(hook) == frozenset()


def test_reading_a_statistic_that_was_not_asked_for_says_what_to_write():
    batch = replace(two_turns("turn"), extras={"topk:2": torch.zeros(3, 6, 2)})
    assert token_statistic(batch, "topk:2").shape == (3, 6, 2)
    assert token_statistic(batch.select([0]), "topk:2").shape == (1, 4, 2)
    with pytest.raises(
        RequirementError, match=r"topk:3 is not .* this batch \(topk:2\).*@requires\('topk:3'\)"
    ):
        token_statistic(batch, "topk:3")
    outputs = Outputs(batch.logprobs, batch.entropies)
    with pytest.raises(RequirementError, match=r"these outputs \(none\).*@requires\('topk:3:grad'\)"):
        token_statistic(outputs, "topk:3")


def test_extras_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"Batch.extras\['topk:2'\] has shape \(2, 4\), wanted \[3, 6"):
        replace(two_turns("turn"), extras={"topk:2": torch.zeros(2, 4)})
