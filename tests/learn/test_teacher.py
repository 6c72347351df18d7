"""A teacher reads the policy's tokens as the policy does, one chunk at a time, and is never trained."""

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from toy_policy import VOCABULARY, WIDTH, ToyPolicy, hidden_states, make_groups, sampled_at, toy_forward

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context, token_statistic
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.token_statistics import loss_statistics, teacher_divergence
from agentrl.data.batch import Batch, collate
from agentrl.errors import RequirementError
from agentrl.learn import fused
from agentrl.learn.fused import paired_statistics
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(total_steps=10, vocabulary=VOCABULARY)
DIVERGENCE = "teacher_divergence:0.4"


def learner_of(teacher: nn.Module | None, policy: nn.Module | None = None, **settings: object) -> Learner:
    defaults = {"optimizer": "adamw", "warmup_steps": 0, "micro_batch_tokens": 60}
    config = LearnerConfig(**{**defaults, **settings})  # type: ignore[arg-type]
    return Learner(policy or ToyPolicy(), config, teacher=teacher, forward=toy_forward())


def distill(**settings: object) -> Algorithm:
    return build_recipe("distill", {"reward_coefficient": 0.0, **settings}).build()


def batch_of(*temperatures: float) -> Batch:
    """Rows with constrained and free tokens, sampled at these temperatures."""
    groups = make_groups()
    return collate(sampled_at(groups, *temperatures, by_token=True) if temperatures else groups)


@pytest.mark.parametrize("temperatures", [(), (0.5, 1.0, 1.7)])
def test_its_log_probabilities_are_those_of_a_learner_of_its_own(temperatures: Sequence[float]) -> None:
    batch = batch_of(*temperatures)
    scored = learner_of(ToyPolicy(2)).score(batch, {"teacher"})
    own = learner_of(None, ToyPolicy(2)).score(batch)
    assert scored.teacher_logprobs is not None
    assert own.old_logprobs is not None
    assert own.old_logprobs.abs().max() > 0.1
    torch.testing.assert_close(scored.teacher_logprobs, own.old_logprobs, rtol=0, atol=1e-12)
    assert learner_of(ToyPolicy(2)).score(batch).teacher_logprobs is None


def whole(policy: ToyPolicy, batch: Batch) -> Tensor:
    """The logits of every position at once; [B, T, V], -inf where a token is not allowed."""
    states = torch.zeros(*batch.tokens.shape, WIDTH, dtype=torch.float64)
    for row, length in enumerate(batch.lengths.tolist()):
        states[row, 1:length] = hidden_states(
            policy, batch.tokens[row, : length - 1], torch.tensor([length - 1])
        )
    logits = states @ policy.embedding.weight.T
    if batch.temperatures is not None:
        logits = logits / batch.temperatures[..., None]
    assert batch.allowed is not None
    choices = torch.ones(logits.shape, dtype=torch.bool)
    for row, position, ids in zip(
        batch.allowed.rows.tolist(), batch.allowed.positions.tolist(), batch.allowed.ids, strict=True
    ):
        choices[row, position] = False
        choices[row, position, ids[ids >= 0]] = True
    return logits.masked_fill(~choices, -torch.inf)


@pytest.mark.parametrize("numbers", [1, 400, 2**24])
@pytest.mark.parametrize("temperatures", [(), (0.5, 1.0, 1.7)])
def test_the_divergence_has_the_value_and_the_slope_of_all_logits_at_once(
    temperatures: Sequence[float], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK_NUMBERS", numbers)
    batch, teacher = batch_of(*temperatures), ToyPolicy(2)
    policy, plain = ToyPolicy(), ToyPolicy()
    learner = learner_of(teacher, policy, micro_batch_tokens=10_000)
    found = learner._scorer.score_rows(learner._state.learned, batch, loss_statistics([f"{DIVERGENCE}:grad"]))
    values = token_statistic(found, DIVERGENCE)
    mask = batch.action_mask
    wanted = teacher_divergence(whole(plain, batch)[mask], whole(teacher, batch)[mask], 0.4)
    torch.testing.assert_close(values[mask], wanted, rtol=0, atol=1e-10)
    assert not bool(values[~mask].any())
    weight = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward((values * weight).sum())
    torch.autograd.backward((wanted * weight[mask]).sum())
    for name, value in policy.named_parameters():
        other = plain.get_parameter(name).grad
        assert value.grad is not None
        assert other is not None
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(value.grad, other, rtol=0, atol=1e-10)
    assert all(value.grad is None for value in teacher.parameters())


def test_no_chunk_holds_more_tokens_than_it_may() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, seen = torch.randn(50, 4, generator=draw), torch.randn(50, 7, generator=draw)
    weight, matrix = torch.randn(13, 4, generator=draw), torch.randn(13, 7, generator=draw)
    held: list[int] = []

    def look(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        held.append(len(logits))
        assert logits.shape == teacher_logits.shape
        return teacher_divergence(logits, teacher_logits, 1.0)

    with patch.object(fused, "CHUNK_NUMBERS", 13 * 8 * 6):
        (few,) = paired_statistics(hidden, weight, (seen, matrix), [look])
    assert max(held) == 6
    (many,) = paired_statistics(hidden, weight, (seen, matrix), [look])
    assert max(held) == 50
    torch.testing.assert_close(few, many)


@pytest.mark.parametrize("mode", ["advantage", "loss"])
def test_a_teacher_that_is_the_policy_gives_no_signal(mode: str) -> None:
    algorithm, policy = distill(mode=mode, beta=1e6), ToyPolicy()
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def look(parameters: list[nn.Parameter], limit: float) -> Tensor:
        norms.append(float(clip(parameters, limit)))
        return torch.tensor(norms[-1])

    with patch.object(nn.utils, "clip_grad_norm_", look):
        for teacher in (ToyPolicy(), ToyPolicy(2)):
            learner = learner_of(teacher, policy)
            batch = prepare(algorithm, make_groups(), CONTEXT)
            learner.update(batch, algorithm, CONTEXT)
    # 1e6 times a rounding error of 1e-16, and then 1e6 times a real divergence.
    assert norms[0] < 1e-8
    assert norms[1] > 1e3


@pytest.mark.parametrize("mode", ["advantage", "loss"])
def test_the_policy_comes_nearer_and_the_teacher_does_not_move(mode: str) -> None:
    algorithm, teacher = distill(mode=mode), ToyPolicy(2)
    learner = learner_of(teacher, learning_rate=0.03, clip_gradient=None)
    gaps = []
    for step in range(40):
        batch = learner.score(prepare(algorithm, make_groups(), CONTEXT), algorithm.requires | {"teacher"})
        assert batch.old_logprobs is not None
        assert batch.teacher_logprobs is not None
        ratio = learner.score(batch, {f"{DIVERGENCE}"}).extras[DIVERGENCE]
        gaps.append(float(ratio[batch.action_mask].mean()))
        learner.update(
            replace(batch, logprobs=batch.old_logprobs), algorithm, replace(CONTEXT, step=step % 10)
        )
    if mode == "loss":  # the rows are fixed and not the policy's own, so that only the loss is exact
        assert gaps[-1] < 0.5 * gaps[0]
    assert all(
        torch.equal(value, other)
        for value, other in zip(teacher.parameters(), ToyPolicy(2).parameters(), strict=True)
    )
    assert "teacher" not in str(learner.state_dict().keys())
    assert not any("teacher" in name for name, _ in learner._state.local_tensors())


def test_a_learner_without_a_teacher_refuses_to_score_with_one() -> None:
    learner = learner_of(None)
    assert "teacher" not in learner.provides
    for name in ("teacher", f"{DIVERGENCE}:grad"):
        with pytest.raises(RequirementError, match="requires a teacher, and the learner was given none"):
            learner.score(batch_of(), {name})
    assert "teacher" in learner_of(ToyPolicy(2)).provides


def test_a_teacher_in_half_precision_is_read_in_its_own() -> None:
    def narrow() -> nn.Module:
        return ToyPolicy(2).to(torch.bfloat16)

    batch = batch_of()
    scores = [
        learner_of(teacher, ToyPolicy().float()).score(batch, {"teacher"}).teacher_logprobs
        for teacher in (narrow(), ToyPolicy(2).float())
    ]
    assert scores[0] is not None
    assert scores[1] is not None
    assert 1e-4 < float((scores[0] - scores[1]).abs().max()) < 0.2
    algorithm = distill(mode="loss")
    numbers = learner_of(narrow(), ToyPolicy().float()).update(
        prepare(algorithm, make_groups(), CONTEXT), algorithm, CONTEXT
    )
    assert numbers["learner/term/distill"] > 0.1
