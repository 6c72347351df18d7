"""Trees of CURE and ETTRL on a language model: exact budgets, recorded points, prefixes read once."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_branching_tokens import ACTIONS, Shop, Table, check_against_plain_forward, tokens, unread
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.trajectory import Episode, Outcome
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer, token_text
from agentrl.rollout.branching import BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import Collection, EpisodeSpec

METHODS: dict[str, dict[str, Any]] = {
    "cure": {"name": "cure"},
    "ettrl, by turn": {"name": "ettrl", "trees": 3},
    "ettrl, by token": {"name": "ettrl", "anchor": "token", "points": 3},
}
each_method = pytest.mark.parametrize("block", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fit_tokenizer([*ACTIONS, "4 shelves", "3 left", "2 left", "1 left"] * 4, 290)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = build_model(PolicyConfig(device="cpu", max_context=256, initial_std=0.02), tokenizer, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4.0)
    return model


def built(block: dict[str, Any]) -> Algorithm:
    return build_recipe(block["name"], {key: value for key, value in block.items() if key != "name"}).build()


def play_tree(table: Table, block: dict[str, Any], make: Any = Shop, **more: Any) -> Collection:
    """Play one task, "a", as the method wants it."""
    plan = built(block).rollout
    assert plan.branch_policy is not None
    assert plan.episodes is not None
    context = Context(token_text=partial(token_text, table.tokenizer), vocabulary=290)
    policy = plan.branch_policy(plan.episodes, 5, context)
    scheduler = BranchScheduler([EpisodeSpec("a", "test/Shelves-v0", "4", 7)], [policy], plan.episodes)
    more = {"max_active": 64} | more
    return collect((), table.player, EnvironmentPool(make), scheduler=scheduler, **more)


def actions(episodes: Sequence[Episode]) -> list[Any]:
    return [(episode.id, episode.parent, [turn.action_ids for turn in episode.turns]) for episode in episodes]


@each_method
@pytest.mark.parametrize("choices", [True, False])
def test_the_budget_is_exact_and_branches_hold_their_parents_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: bool, block: dict[str, Any]
) -> None:
    played = play_tree(Table(model, tokenizer, choices), block)
    episodes, plan = played.episodes, built(block).rollout
    assert len(episodes) == plan.episodes
    named = {episode.id: episode for episode in episodes}
    branches = [episode for episode in episodes if episode.parent is not None]
    trunks = [episode for episode in episodes if episode.parent is None]
    each = Counter(episode.parent.parent for episode in branches if episode.parent is not None)
    assert each == {trunk.id: len(branches) // len(trunks) for trunk in trunks}
    for child in branches:
        point = child.parent
        assert point is not None
        assert (point.turn, point.token) != (0, 0)
        parent = named[point.parent]
        assert child.turns[: point.turn] == parent.turns[: point.turn]
        given = parent.turns[point.turn].action_ids[: point.token]
        assert child.turns[point.turn].action_ids[: point.token] == given
        assert not any(child.turns[point.turn].action_mask[: point.token])
    for episode in episodes:
        assert episode.outcome == Outcome.SUCCESS
        check_against_plain_forward(model, episode)
    assert played.branches["restored"] == len(branches)


@each_method
def test_a_prefix_is_read_once_in_the_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, block: dict[str, Any]
) -> None:
    table = Table(model, tokenizer, choices=False)
    episodes = play_tree(table, block).episodes
    alone = Table(model, tokenizer, choices=False)
    trunks = len([episode for episode in episodes if episode.parent is None])
    alone.play_branches({"begin": [None] * trunks}, trunks)
    copied = 0
    for child in episodes:
        if child.parent is not None:
            shared = child.turns[: child.parent.turn]
            prompt = len(child.turns[child.parent.turn].prompt_ids)
            copied += tokens(shared) + prompt + child.parent.token - 1
    whole = sum(tokens(child.turns) - unread(child) for child in episodes if child.parent is not None)
    assert copied > 0
    assert table.engine.tokens_forwarded == alone.engine.tokens_forwarded + whole - copied


@each_method
def test_trees_are_those_of_the_seed_also_one_episode_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, block: dict[str, Any]
) -> None:
    together = play_tree(Table(model, tokenizer), block).episodes
    for slots, active in ((64, 1), (3, 5)):
        again = play_tree(Table(model, tokenizer, slots=slots), block, max_active=active).episodes
        assert actions(again) == actions(together)


class Breaking(Shop):
    """Shop that breaks once, in the second step of an episode."""

    broke = False

    def on_step(self, answer: Any) -> Any:
        if self.steps == 2 and not self.broke:
            type(self).broke = True
            raise RuntimeError("broken")
        return super().on_step(answer)


@each_method
def test_a_budget_is_exact_where_a_trunk_is_aborted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, block: dict[str, Any]
) -> None:
    Breaking.broke = False
    episodes = play_tree(Table(model, tokenizer), block, Breaking).episodes
    assert len(episodes) == built(block).rollout.episodes
    (broken,) = [episode for episode in episodes if episode.stop.aborted]
    assert broken.parent is None
    children = [
        episode.parent for episode in episodes if episode.parent and episode.parent.parent == broken.id
    ]
    assert children
    assert {(point.turn, point.token) for point in children} == {(0, 0)}


def test_in_the_second_stage_of_cure_nothing_branches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    episodes = play_tree(Table(model, tokenizer), {"name": "cure", "second_stage": 0}).episodes
    assert len(episodes) == 16
    assert all(episode.parent is None for episode in episodes)
