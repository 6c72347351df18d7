"""What components remember: updated once a step, restored bit for bit, equal on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp_worker import measured
from remembering import ReturnModel, VisitBonus
from torch import Tensor
from toy_policy import VOCABULARY, ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context, MiniBatch, Term, requires
from agentrl.algorithms.stateful import states_of
from agentrl.data import Group
from agentrl.data.batch import Layout
from agentrl.errors import CheckpointError, ConfigError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig
from agentrl.run.checkpoint import Progress, load_learner, load_progress, save_checkpoint

CONTEXT = Context(total_steps=10, vocabulary=VOCABULARY, tokenizer="toy")


def learner_of(**settings: Any) -> Learner:
    config = {"warmup_steps": 0, "micro_batch_tokens": 60, "optimizer": "adamw", "mini_batches": 2}
    return Learner(ToyPolicy(), LearnerConfig(**config | settings), forward=toy_forward())


def remembering() -> Algorithm:
    counts = VisitBonus()
    return Algorithm(shape_reward=(counts.bonus,), transforms=(ReturnModel(),), diagnostics=(counts.metrics,))


def steps_of(
    algorithm: Algorithm,
    steps: range,
    learner: Learner,
    *,
    layout: Layout = "trajectory",
    groups: Mapping[int, list[Group]] | None = None,
) -> list[dict[str, float]]:
    logged = []
    for step in steps:
        context = replace(CONTEXT, step=step)
        played = make_groups(step) if groups is None else groups[step]
        batch = prepare(algorithm, played, context, layout=layout)
        logged.append(learner.update(batch, algorithm, context))
    return logged


def weights(learner: Learner) -> Tensor:
    return torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


def model_of(algorithm: Algorithm) -> ReturnModel:
    found = algorithm.find_stateful()["return_model"]
    assert isinstance(found, ReturnModel)
    return found


def test_a_component_is_updated_once_a_step_after_the_optimiser_and_before_the_diagnostics() -> None:
    """Turns all observe "o": a bonus of 1 in the first step, 1 / sqrt(1 + n) in the second."""
    algorithm = remembering()
    first, second = make_groups(0), make_groups(1)
    turns = sum(len(episode.turns) for group in first for episode in group.episodes)
    learner = learner_of(mini_batches=3, epochs=2)
    assert prepare(algorithm, first, CONTEXT).returns[0] == len(first[0].episodes[0].turns)
    logged = steps_of(algorithm, range(1), learner)
    assert logged[0]["algorithm/visits/states"] == 1
    shaped = prepare(algorithm, second, CONTEXT).returns[0]
    assert shaped == pytest.approx(len(second[0].episodes[0].turns) * (1 + turns) ** -0.5)
    assert list(algorithm.find_stateful()["visits"].state_dict()["counts"].values()) == [turns]


def test_a_model_is_trained_on_the_whole_rollout_batch_by_its_own_optimiser() -> None:
    """Adam's first step moves every parameter by its learning rate, against the sign of the gradient."""
    algorithm = remembering()
    model = model_of(algorithm)
    before = model.flat()
    learner = learner_of()
    steps_of(algorithm, range(1), learner)
    assert (model.flat() - before).abs().tolist() == pytest.approx([0.1] * 3, rel=1e-6)
    plain = learner_of()
    steps_of(replace(algorithm, transforms=()), range(1), plain)
    assert not torch.equal(weights(learner), weights(plain))


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("turn", {}),
        ("trajectory", {"micro_batch_tokens": 1}),
        ("turn", {"micro_batch_tokens": 10_000}),
        ("trajectory", {"micro_batch_tokens": 25}),
    ],
)
def test_layout_micro_batches_order_and_padding_do_not_matter(
    layout: Layout, settings: dict[str, Any]
) -> None:
    whole = {"mini_batches": 1, "micro_batch_tokens": 10_000}
    one, other = remembering(), remembering()
    ends = [learner_of(**whole), learner_of(**whole | settings)]
    steps_of(one, range(3), ends[0])
    turned = {
        step: [replace(group, episodes=group.episodes[::-1]) for group in reversed(make_groups(step))]
        for step in range(3)
    }
    steps_of(other, range(3), ends[1], layout=layout, groups=turned)
    torch.testing.assert_close(model_of(other).flat(), model_of(one).flat(), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(ends[1]), weights(ends[0]), rtol=0, atol=1e-6)
    assert (
        one.find_stateful()["visits"].state_dict()["counts"]
        == other.find_stateful()["visits"].state_dict()["counts"]
    )


def test_a_checkpoint_brings_everything_back_bit_for_bit(tmp_path: Path) -> None:
    algorithm, learner = remembering(), learner_of()
    steps_of(algorithm, range(2), learner)
    path = save_checkpoint(tmp_path, Progress("train", 2), learner, states_of(algorithm.find_stateful()))
    logged = steps_of(algorithm, range(2, 5), learner)

    resumed, again = remembering(), learner_of()
    load_progress(path)
    states = load_learner(path, again)
    assert list(states) == ["visits", "return_model"]
    for name, component in resumed.find_stateful().items():
        component.load_state_dict(states[name], CONTEXT)
    assert steps_of(resumed, range(2, 5), again) == logged
    assert torch.equal(weights(again), weights(learner))
    assert torch.equal(model_of(resumed).flat(), model_of(algorithm).flat())

    forgetful, third = remembering(), learner_of()  # the test would notice
    load_learner(path, third)
    assert steps_of(forgetful, range(2, 5), third) != logged


@pytest.mark.parametrize("replay", [None, {"rows": [1]}])
def test_a_checkpoint_of_an_older_version_holds_a_replay_at_most(
    replay: dict[str, Any] | None, tmp_path: Path
) -> None:
    learner = learner_of()
    path = save_checkpoint(tmp_path, Progress("train", 1), learner, replay and {"replay": replay})
    state = torch.load(path / "learner.pt", weights_only=True)
    assert state.pop("stateful") == {}
    assert state["replay"] == replay
    torch.save(state, path / "learner.pt")
    assert load_learner(path, learner) == ({} if replay is None else {"replay": replay})


def test_components_are_found_wherever_a_slot_shows_them() -> None:
    def listed(name: str) -> VisitBonus:
        made = VisitBonus()
        made.name = name
        return made

    hook, argument, term, coefficient, alone = map(
        listed, ("hook", "argument", "term", "coefficient", "alone")
    )

    def bonus(episode, context, *, counts):
        return counts.bonus(episode, context)

    algorithm = Algorithm(
        shape_reward=(hook.bonus, partial(bonus, counts=argument)),
        terms=(Term("t", partial(bonus, counts=term), coefficient.metrics),),
        diagnostics=(hook.metrics,),
        stateful=(alone, hook),
    )
    names = ["hook", "argument", "term", "coefficient", "alone"]
    assert sorted(algorithm.find_stateful()) == sorted(names)
    assert list(algorithm.find_stateful("shape_reward")) == ["hook", "argument"]
    assert not Algorithm().find_stateful()


def test_components_that_refer_to_each_other_are_found_once() -> None:
    @dataclass(eq=False)
    class Hook(VisitBonus):
        inner: VisitBonus
        other: object = None
        name: str = "hook"

    hook = Hook(VisitBonus())
    hook.other = hook
    assert list(Algorithm(stateful=(hook,)).find_stateful()) == ["hook", "visits"]


def test_what_update_requires_is_required_but_makes_no_scoring_pass_necessary() -> None:
    class Watching(VisitBonus):
        @requires("entropy", "reference")
        def update(self, rollout: MiniBatch, context: Context) -> None: ...

    algorithm = Algorithm(stateful=(Watching(),))
    assert {"entropy", "reference"} <= algorithm.requires
    assert not algorithm.reads_scores


def test_two_of_one_name_one_without_a_name_and_one_that_is_not_stateful_are_refused() -> None:
    class Nameless(VisitBonus):
        def __init__(self) -> None:
            super().__init__(name=None)

    with pytest.raises(ConfigError, match="two stateful components are named 'visits'"):
        Algorithm(stateful=(VisitBonus(), VisitBonus()))
    with pytest.raises(ConfigError, match="Nameless is stateful and its `name` is None"):
        Algorithm(shape_reward=(Nameless().bonus,))
    with pytest.raises(ConfigError, match="stateful: dict lacks one of `update`, `state_dict`"):
        Algorithm(stateful=({},))


def test_a_state_that_no_checkpoint_gives_back_is_refused_when_it_is_saved() -> None:
    class Arrays(VisitBonus):
        def state_dict(self) -> dict[str, Any]:
            return {"rows": [{"mean": np.float64(1)}]}

    with pytest.raises(CheckpointError, match=r"the state of visits.rows.0.mean is of type numpy.float64"):
        states_of({"visits": Arrays()})


def test_every_rank_holds_the_state_of_a_single_process(tmp_path: Path) -> None:
    found = measured(tmp_path, "remembered")["remembered"]
    assert found["ranks equal"] == [True, True]
    assert found["moved"] > 0.05
    assert found["apart"] < 1e-9
    assert found["weights"] < 1e-9
    assert found["restored"] == 0.0
