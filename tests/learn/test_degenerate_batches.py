"""What can be wrong with a batch has a defined result under every recipe; no NaN reaches the weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from toy_policy import VOCABULARY, ToyPolicy, make_groups, toy_forward
from toy_views import toy_perturb

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe, recipe_names
from agentrl.algorithms.token_statistics import reads_teacher
from agentrl.data import Episode, Group, StopReason
from agentrl.data.batch import collate
from agentrl.data.trajectory import BranchPoint
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(step=4, total_steps=10, vocabulary=VOCABULARY, tokenizer="toy")

Change = Callable[[Group], Group]


def each(change: Callable[[Episode], Episode]) -> Change:
    return lambda group: replace(group, episodes=tuple(map(change, group.episodes)))


def paid(reward: float) -> Change:
    def last(episode: Episode) -> Episode:
        turns = [replace(turn, reward=0.0) for turn in episode.turns]
        return replace(episode, turns=(*turns[:-1], replace(turns[-1], reward=reward)))

    return each(last)


def forced(episode: Episode) -> Episode:
    """Every token had a single allowed id: the policy decided nothing."""
    turns = (replace(turn, allowed=tuple((token,) for token in turn.action_ids)) for turn in episode.turns)
    return replace(episode, turns=tuple(turns))


def certain(episode: Episode) -> Episode:
    turns = (
        replace(turn, entropies=(0.0,) * len(turn.action_ids), logprobs=(0.0,) * len(turn.action_ids))
        for turn in episode.turns
    )
    return replace(episode, turns=tuple(turns))


CASES: dict[str, Change] = {
    "groups of one": lambda group: replace(group, episodes=group.episodes[:1]),
    "equal returns": paid(1.0),
    "no reward at all": paid(0.0),
    "nothing decided": each(forced),
    "one without decisions": lambda group: replace(
        group, episodes=(forced(group.episodes[0]), *group.episodes[1:])
    ),
    "all aborted": each(lambda episode: replace(episode, stop=StopReason.ENV_ERROR)),
    "all but one aborted": lambda group: replace(
        group,
        episodes=(
            group.episodes[0],
            *(replace(episode, stop=StopReason.ENGINE_ERROR) for episode in group.episodes[1:]),
        ),
    ),
    "single-turn": each(lambda episode: replace(episode, turns=episode.turns[-1:])),
    "no doubt": each(certain),
    "cut off": each(lambda episode: replace(episode, stop=StopReason.CONTEXT_LIMIT)),
    "explored": lambda group: replace(
        group,
        episodes=(
            group.episodes[0],
            *(replace(other, parent=BranchPoint(group.episodes[0].id, 0)) for other in group.episodes[1:]),
        ),
    ),
    "huge rewards": paid(1e30),
}


def learner_for(algorithm: Algorithm) -> Learner:
    policy = ToyPolicy()
    reference = ToyPolicy(1) if "reference" in algorithm.requires else None
    config = LearnerConfig(optimizer="adamw", learning_rate=0.1, warmup_steps=0, mini_batches=2)
    critic = "values" in algorithm.requires
    teacher = ToyPolicy(2) if reads_teacher(algorithm.requires) else None
    judge = None if algorithm.reward_model is None else ToyPolicy(1)
    return Learner(
        policy,
        config,
        reference=reference,
        teacher=teacher,
        critic=critic,
        reward_model=judge,
        forward=toy_forward(),
        perturb=toy_perturb,
    )


def finite(learner: Learner) -> bool:
    return all(bool(value.isfinite().all()) for value in learner.policy.parameters())


def updated(algorithm: Algorithm, groups: Sequence[Group], *, selected: bool) -> Learner:
    """Two steps; `selected` passes the groups by what an algorithm would leave out."""
    learner = learner_for(algorithm)
    for step in (4, 5):
        context = replace(CONTEXT, step=step)
        batch = prepare(algorithm, groups, context, selected=selected)
        learner.update(batch, algorithm, context)
    return learner


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", recipe_names())
def test_the_weights_stay_finite(name: str, case: str, selected: bool) -> None:
    torch.manual_seed(0)
    groups = [CASES[case](group) for group in make_groups(2, groups=2, size=3)]
    learner = updated(build_recipe(name).build(), groups, selected=selected)
    assert finite(learner)
    assert learner.skipped_updates == 0
    if case in ("nothing decided", "all aborted"):
        assert torch.equal(learner.policy.mix, ToyPolicy().mix)


@pytest.mark.parametrize("old", [-1e4, 1e4, -torch.inf])
@pytest.mark.parametrize("name", recipe_names())
def test_infinite_log_ratios_are_held_or_their_step_is_skipped(name: str, old: float) -> None:
    algorithm = build_recipe(name).build()
    learner = learner_for(algorithm)
    batch = learner.score(collate(make_groups(2)), algorithm.requires, algorithm.view)
    spoiled = torch.where(batch.action_mask, old, 0.0)
    numbers = learner.update(replace(batch, old_logprobs=spoiled), algorithm, CONTEXT)
    assert finite(learner)
    # Without branches fr3e has nothing to learn from.
    assert (numbers["learner/updates"] + numbers["learner/skipped_updates"] >= 2) is (name != "fr3e")


@pytest.mark.parametrize("name", recipe_names())
def test_nan_where_nothing_was_sampled_changes_nothing(name: str) -> None:
    algorithm = build_recipe(name).build()
    weights = []
    for spoil in (0.0, torch.nan):
        learner = learner_for(algorithm)
        batch = learner.score(collate(make_groups(2)), algorithm.requires, algorithm.view)
        fields = ("logprobs", "entropies", "old_logprobs", "old_entropies", "values", "reference_logprobs")
        spoiled = {
            field: torch.where(batch.action_mask, value, spoil)
            for field in fields
            if (value := getattr(batch, field)) is not None
        }
        learner.update(replace(batch, **spoiled), algorithm, CONTEXT)
        weights.append(torch.cat([value.detach().flatten() for value in learner.policy.parameters()]))
    assert torch.equal(*weights)
