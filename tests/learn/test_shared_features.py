"""Features in the learner: computed once, shared by all hooks, and the same however rows are laid out."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from feature_readers import entropy_loss, reading_features, wander, weigh
from torch import Tensor
from toy_policy import VOCABULARY, ToyPolicy, make_groups, toy_forward

from agentrl.algorithms import named_features
from agentrl.algorithms.algorithm import Algorithm, ReplayBatch
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.features import turns_to_tokens
from agentrl.algorithms.hooks import Context, MiniBatch, Term, requires
from agentrl.algorithms.named_features import feature, feature_of, mini_batch_feature
from agentrl.data import Group
from agentrl.data.batch import Batch, Layout, collate
from agentrl.errors import RequirementError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(total_steps=10, vocabulary=VOCABULARY, tokenizer="toy")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no feature of a test registered."""
    known = named_features._functions
    monkeypatch.setattr(known, "_functions", dict(known._functions))
    monkeypatch.setattr(named_features, "_of_mini_batch", set(named_features._of_mini_batch))
    return


def learner_of(**settings: Any) -> Learner:
    config = {"warmup_steps": 0, "micro_batch_tokens": 60, "optimizer": "adamw", "mini_batches": 2}
    return Learner(ToyPolicy(), LearnerConfig(**config | settings), forward=toy_forward())


def weights_after(
    groups: list[Group], algorithm: Algorithm, layout: Layout = "trajectory", **settings: Any
) -> Tensor:
    learner = learner_of(**settings)
    for step in range(2):
        batch = prepare(algorithm, groups, CONTEXT, layout=layout)
        learner.update(batch, algorithm, replace(CONTEXT, step=step))
    return torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("turn", {}),
        ("trajectory", {"micro_batch_tokens": 1}),
        ("turn", {"micro_batch_tokens": 10_000}),  # padded to the longest of all rows
    ],
)
def test_layout_micro_batches_and_padding_do_not_matter(layout: Layout, settings: dict[str, Any]) -> None:
    groups, whole = wander(make_groups()), {"mini_batches": 1, "epochs": 2}
    wanted = weights_after(groups, reading_features(), **whole)
    found = weights_after(groups, reading_features(), layout, **whole | settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    without = weights_after(groups, Algorithm(), layout, **whole | settings)  # the test would notice
    assert (without - wanted).abs().max() > 1e-3


def test_a_feature_is_computed_once_a_batch_and_that_of_a_mini_batch_once_each(registry: None) -> None:
    calls: list[str] = []

    @feature("counted")
    def counted(batch: Batch) -> Tensor:
        calls.append("batch")
        return torch.ones(len(batch.episodes))

    @mini_batch_feature("counted_tokens")
    @requires("counted", "current")
    def counted_tokens(mini: MiniBatch) -> Tensor:
        calls.append("mini-batch")
        return feature_of(mini, "counted")[mini.batch.trajectory][:, None] * mini.now.entropies

    @requires("counted", "counted_tokens")
    def weight(mini: MiniBatch, context: Context) -> Tensor:
        return feature_of(mini, "counted_tokens")

    @requires("counted")
    def transform(advantages: Tensor, batch: Batch, context: Context) -> Tensor:
        return advantages * feature_of(batch, "counted")[batch.trajectory][:, None]

    @requires("counted")
    def measure(mini: MiniBatch, context: Context) -> Mapping[str, float]:
        return {"counted": float(feature_of(mini, "counted").sum())}

    algorithm = Algorithm(transforms=(transform,), weights=(weight, weight), diagnostics=(measure,))
    assert {"counted", "counted_tokens", "current"} <= algorithm.requires
    numbers = learner_of(mini_batches=3, epochs=2, micro_batch_tokens=20).update(
        collate(make_groups()), algorithm, CONTEXT
    )
    assert numbers["algorithm/counted"] == 12
    assert (calls.count("batch"), calls.count("mini-batch")) == (1, 6)


def test_a_mini_batch_sees_the_values_of_the_whole_batch() -> None:
    seen: dict[str, list[list[float]]] = {}

    @requires("turn_entropy")
    def weight(mini: MiniBatch, context: Context) -> Tensor:
        seen.setdefault("mini-batches", []).append(feature_of(mini, "turn_entropy").tolist())
        return torch.ones_like(mini.advantages)

    def measure(mini: MiniBatch, context: Context) -> Mapping[str, float]:
        seen["batch"] = feature_of(mini, "turn_entropy").tolist()
        return {}

    algorithm = Algorithm(weights=(weight,), diagnostics=(measure,))
    assert algorithm.reads_scores
    learner_of(mini_batches=3).update(collate(make_groups()), algorithm, CONTEXT)
    assert seen["mini-batches"] == [seen["batch"]] * 3


def test_entropies_that_only_a_diagnostic_reads_are_scored() -> None:
    @requires("episode_entropy")
    def measure(mini: MiniBatch, context: Context) -> Mapping[str, float]:
        return {"entropy": float(feature_of(mini, "episode_entropy").sum())}

    algorithm = Algorithm(diagnostics=(measure,))
    assert algorithm.reads_scores
    numbers = learner_of(mini_batches=1).update(collate(make_groups()), algorithm, CONTEXT)
    assert numbers["algorithm/entropy"] > 1


def test_a_mini_batch_has_no_features_that_nothing_requires() -> None:
    def weight(mini: MiniBatch, context: Context) -> Tensor:
        return turns_to_tokens(feature_of(mini, "states").double(), mini.batch)

    with pytest.raises(RequirementError, match=r"states is not among .*@requires\('states'\)"):
        learner_of().update(collate(make_groups()), Algorithm(weights=(weight,)), CONTEXT)


def test_replayed_rows_have_the_features_that_their_loss_reads() -> None:
    batch = collate(wander(make_groups(1)))
    replayed = replace(batch, old_logprobs=batch.logprobs, old_entropies=batch.entropies)
    loss = Algorithm(weights=(weigh,), terms=(Term("read", entropy_loss, 0.1),))

    class Memory:
        name = "replay"

        def sample(self, context: Context) -> ReplayBatch:
            return ReplayBatch(replayed, torch.ones_like(batch.logprobs), lambda _: loss)

        def metrics(self) -> Mapping[str, float]:
            return {}

        def update(self, rollout: MiniBatch, context: Context) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None: ...

    numbers = learner_of().update(collate(make_groups()), Algorithm(replay=Memory()), CONTEXT)
    assert numbers["algorithm/replay/term/read"] != 0
