"""Named features: their values by hand, and what is refused."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agentrl.algorithms import functional, named_features
from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.algorithms.features import turn_rewards
from agentrl.algorithms.functional import group_relative_advantage
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.algorithms.named_features import feature, feature_of, with_features
from agentrl.algorithms.recipe import build_recipe, recipe_names
from agentrl.algorithms.states import VisitCounts, states
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import CheckpointError, ConfigError, RequirementError

CONTEXT = Context()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no feature of a test registered."""
    known = named_features._functions
    monkeypatch.setattr(known, "_functions", dict(known._functions))
    return


def episode(name: str, *seen: str, success: bool = False, end: str = "", action: str = "a") -> Episode:
    """One turn for each observation, with one action token; only the last turn has a reward."""
    turns = tuple(
        Turn(
            observation,
            action,
            prompt_ids=(1,),
            action_ids=(5,),
            reward=float(success and index == len(seen) - 1),
            new_sequence=index == 0,
        )
        for index, observation in enumerate(seen)
    )
    stop = StopReason.TERMINATED
    return Episode(name, "env", "t", 0, turns, stop, success=success, final_observation=end)


def batch_of(*groups: Sequence[Episode]) -> Batch:
    return collate([Group(f"t{number}", tuple(group)) for number, group in enumerate(groups)])


def named(batch: Batch, name: str) -> list[float]:
    return feature_of(batch, name).tolist()


# The graph of GraphGPO's example: a reaches success, b and c end in s3.
GRAPH = (
    episode("a", "s0", "s1", "s2", success=True, end="won"),
    episode("b", "s0", "s1", end="s3"),
    episode("c", "s0", "s3", end="s3"),
)


def test_distances_to_success_run_over_the_turns_of_the_whole_group() -> None:
    assert named(batch_of(GRAPH), "success_distance") == [[3, 2, 1, 0], [3, 2, 4, -1], [3, 4, 4, -1]]


def test_the_step_advantages_of_the_published_example_follow_from_the_distances() -> None:
    """R = 10 gamma^distance of the next state, compared between the turns of one state; gamma is 0.1."""
    batch = batch_of(GRAPH)
    played = feature_of(batch, "states") >= 0
    rewards = 10 * 0.1 ** feature_of(batch, "success_distance")[:, 1:].double()
    found = group_relative_advantage(rewards[played], feature_of(batch, "states")[played], divide_by_std=True)
    wanted = [0.577340, 0.707106, 0, 0.577340, -0.707106, -1.154680, 0]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)


def test_distances_are_those_of_the_own_group_and_1_without_a_success() -> None:
    lost = [replace(each, success=False) for each in GRAPH]
    assert named(batch_of(GRAPH, lost), "success_distance")[3:] == [[1] * 4, [1, 1, 1, -1], [1, 1, 1, -1]]


def test_similar_observations_are_one_node() -> None:
    group = (
        episode("a", "the long hall A", "shed", success=True),
        episode("b", "the long hall B", end="the long hall C"),
    )
    assert named(batch_of(group), "success_distance:0.9") == [[2, 1, 0], [2, 2, -1]]
    assert named(batch_of(group), "success_distance") == [[2, 1, 0], [3, 3, -1]]


# The rows of HGPO's example, as (observation, return from the turn on).
HISTORY = (episode("a", "s0", "g"), episode("b", "s0", "g"), episode("c", "s0", "y", "g"))


def test_histories_of_the_published_example_are_told_apart() -> None:
    """A = the sum of w_k A_k without the groups of one, with w = (1, 2) / 3 for histories of 0 and 1."""
    batch = batch_of(HISTORY)
    assert named(batch, "history_states:0") == [[0, 1, -1], [0, 1, -1], [0, 2, 1]]
    assert named(batch, "history_states:1") == [[0, 1, -1], [0, 1, -1], [0, 2, 3]]
    returns = torch.tensor([[0.95, 1, 0], [0, 0, 0], [0.9025, 0.95, 1]], dtype=torch.float64)
    played = feature_of(batch, "states") >= 0
    total, weight = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for k in (0, 1):
        numbers = feature_of(batch, f"history_states:{k}")[played]
        shared = numbers.bincount()[numbers] > 1
        total += shared * (k + 1) * group_relative_advantage(returns[played], numbers, divide_by_std=False)
        weight += shared * (k + 1)
    wanted = [0.3325, 0.444444, -0.617499, -0.555555, 0.285, 0, 0.333333]
    assert (total / weight.clamp(min=1)).tolist() == pytest.approx(wanted, abs=2e-6)


def test_visits_are_counted_up_to_the_turn_within_the_episode() -> None:
    batch = batch_of([episode("a", "x", "y", "x", "x"), episode("b", "x")])
    assert named(batch, "state_visits") == [[1, 1, 2, 3], [1, 0, 0, 0]]


def test_answers_are_clustered_within_their_group() -> None:
    answers = ["42", " 42.", "The  Mug", "the mug", "", ""]
    group = [episode(str(i), "o", action=text, end=f"end {i % 2}") for i, text in enumerate(answers)]
    batch = batch_of(group, [replace(group[0], id="other")], [replace(group[0], id="none", turns=())])
    assert named(batch, "answer_clusters") == [0, 0, 1, 1, 2, 3, 4, 5]
    assert named(batch, "answer_clusters:exact") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert named(batch, "answer_clusters:state") == [0, 1, 0, 1, 0, 1, 2, 3]


def test_an_answer_that_is_not_understood_is_none() -> None:
    said = episode("a", "o", action="42")
    wrong = replace(said, id="b", turns=(replace(said.turns[0], valid=False),))
    assert named(batch_of([said, wrong, replace(wrong, id="c")]), "answer_clusters") == [0, 1, 2]


def test_the_answers_of_the_published_examples_have_their_shares_and_entropies() -> None:
    ids, group = torch.tensor([0, 0, 0, 1, 1, 2, 3]), torch.zeros(7, dtype=torch.int64)
    assert functional.cluster_shares(ids, group).tolist() == pytest.approx(
        [3 / 7] * 3 + [2 / 7] * 2 + [1 / 7] * 2
    )
    assert functional.cluster_entropy(ids, group).tolist() == pytest.approx([1.277034] * 7, abs=1e-6)
    likely = torch.tensor([-0.2, -0.3, -0.5, -1.0])
    seed = functional.cluster_entropy(torch.tensor([0, 0, 1, 2]), torch.zeros(4, dtype=torch.int64), likely)
    assert seed.tolist() == pytest.approx([0.921135] * 4, abs=1e-6)
    group = [episode(str(i), "o", action=f"answer {number}") for i, number in enumerate(ids.tolist())]
    assert named(batch_of(group), "answer_entropy") == pytest.approx([1.277034] * 7, abs=1e-6)


def test_entropies_are_means_over_tokens_then_over_episodes() -> None:
    """Episodes a and b of one group have entropies of turns (1, 2) and (6); c is alone and has none."""
    forced = episode("c", "o")
    forced = replace(forced, turns=(replace(forced.turns[0], allowed=((5,),)),))
    batch = batch_of([episode("a", "x", "y"), episode("b", "x")], [forced])
    values = torch.zeros_like(batch.logprobs)
    values[batch.action_mask] = torch.tensor([1.0, 2.0, 6.0])
    batch = replace(batch, old_entropies=values)
    assert named(batch, "turn_entropy") == [[1, 2], [6, 0], [0, 0]]
    assert named(batch, "episode_tokens") == [2, 1, 0]
    assert named(batch, "episode_entropy") == [1.5, 6, 0]
    assert named(batch, "group_entropy") == [3.75, 3.75, 0]
    assert [named(batch, f"entropy_quantile:{share}") for share in (0, 0.5, 1)] == [1, 2, 6]


def test_visits_of_earlier_steps_are_counted_once_for_branches_and_come_back_from_a_checkpoint() -> None:
    base = episode("a", "x", "y", "x")
    branch = replace(base, id="b", parent=BranchPoint("a", 2))
    batch = batch_of([base, branch])
    counts = VisitCounts()
    counts.update(MiniBatch(batch, batch.logprobs), CONTEXT)
    assert counts.visits(base) == [3, 1, 3]  # x in two turns of a and in one of b
    again = VisitCounts()
    again.load_state_dict(counts.state_dict(), CONTEXT)
    assert (again.visits(base), len(again)) == ([3, 1, 3], 2)
    with pytest.raises(CheckpointError, match="counted states by observation, wanted by state_key"):
        VisitCounts(by="state_key").load_state_dict(counts.state_dict(), CONTEXT)


def test_one_function_adds_a_feature(registry: None) -> None:
    @feature("late_reward")
    @requires("states")
    def late_reward(batch: Batch, turn: int = 1) -> Tensor:
        assert "states" in batch.features
        return turn_rewards(batch)[:, turn]

    batch = batch_of([episode("a", "x", "y", success=True), episode("b", "x")])
    assert named(batch, "late_reward") == [1, 0]
    assert named(batch, "late_reward:0") == [0, 0]

    @requires("late_reward:0")
    def advantage(batch: Batch, context: Context) -> Tensor:
        return feature_of(batch, "late_reward:0")[batch.trajectory][:, None] * batch.action_mask

    assert Algorithm(advantage=advantage).requires == {"late_reward:0", "states", "old_logprobs"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("state", r"state \(did you mean states\[:BY\]\?\)"),
        ("history_states", r"it needs an argument: history_states:K"),
        ("history_states:-1", r"k: input should be greater than or equal to 0"),
        ("states:1.5", r"by: input should be 'observation' or 'state_key'"),
        ("branch_weights:2", r"branch_weights takes no argument"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_reason(name: str, why: str) -> None:
    @requires(name)
    def mask(mini: MiniBatch, context: Context) -> Tensor:
        raise NotImplementedError

    with pytest.raises(RequirementError, match=f"masks requires .*{why}"):
        check_requirements(Algorithm(masks=(mask,)), {"old_logprobs"})


def test_scores_that_a_feature_needs_must_be_provided() -> None:
    @requires("group_entropy")
    def mask(mini: MiniBatch, context: Context) -> Tensor:
        raise NotImplementedError

    algorithm = Algorithm(masks=(mask,))
    assert algorithm.requires >= {"group_entropy", "episode_entropy", "entropy"}
    with pytest.raises(RequirementError, match="masks requires entropy; this run provides old_logprobs"):
        check_requirements(algorithm, {"old_logprobs"})
    check_requirements(algorithm, {"old_logprobs", "entropy"})


def test_two_functions_of_one_name_and_a_feature_of_rows_are_refused(registry: None) -> None:
    with pytest.raises(ConfigError, match="two features are named 'states'"):
        feature("states")(lambda batch: batch.returns)
    feature("rows")(lambda batch: batch.trajectory)
    first, second = episode("a", "x", "y"), episode("b", "x")
    apart = tuple(replace(turn, new_sequence=True) for turn in first.turns)
    batch = batch_of([replace(first, turns=apart), second])
    with pytest.raises(ValueError, match=r"feature rows has shape \(3,\), wanted \[2, ...\]"):
        with_features(batch, ["rows"])


def test_the_built_in_methods_share_what_they_have_in_common() -> None:
    required = {name: build_recipe(name).build().requires for name in recipe_names()}
    assert {"states:observation", "branch_weights"} <= required["gigpo"]
    assert {"turn_entropy", "branch_weights", "entropy"} <= required["empg"]
    assert "episode_entropy" in required["canon"]
    assert all({"covariance", "current"} <= required[name] for name in ("clip_cov", "kl_cov", "spear"))
    assert math.prod(states(batch_of(GRAPH)).shape) == 9
