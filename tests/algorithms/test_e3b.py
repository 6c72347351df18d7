"""E3B: bonuses of new observations within an episode and across steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import shape_episode
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.novelty import ObservationNovelty, RandomNetwork, observations, text_features
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.stateful import states_of
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.data.trajectory import BranchPoint
from agentrl.errors import CheckpointError, ConfigError

Build = Callable[..., Algorithm]
PLAIN = {"divide_by_std": False, "coefficient": 1.0, "reward_range": [-100.0, 100.0]}


def walk(texts: Sequence[str], reward: float = 0.0, stop: StopReason = StopReason.TERMINATED) -> Episode:
    """An episode that sees these observations, the last one after its last reply."""
    turns = tuple(
        Turn(text, "a", (1,), (2, 3), (-1.0, -1.0), (1.0, 1.0), new_sequence=index == 0)
        for index, text in enumerate(texts[:-1])
    )
    if turns:
        turns = (*turns[:-1], replace(turns[-1], reward=reward))
    return Episode("-".join(texts), "env", "t", 0, turns, stop, final_observation=texts[-1])


def learned(algorithm: Algorithm, *episodes: Episode) -> None:
    """Let the stateful components see a step."""
    batch = collate([Group("t", episodes)])
    for component in algorithm.find_stateful().values():
        component.update(MiniBatch(batch, torch.zeros(batch.tokens.shape)), Context())


def rewards(algorithm: Algorithm, episode: Episode) -> list[float]:
    for shape in algorithm.shape_reward:
        episode = shape_episode(episode, shape, Context())
    return [turn.reward for turn in episode.turns]


@pytest.mark.vector("zoo:1.26a")
def test_the_elliptical_bonus() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.7, 0.7]], dtype=torch.float64)
    found = functional.elliptical_bonuses(features, 0.1)
    assert found.tolist() == pytest.approx([10, 0.909091, 10, 0.678788], abs=5e-7)
    # By the definition: the inverse of the covariance of the features before.
    for index, feature in enumerate(features):
        covariance = 0.1 * torch.eye(2) + features[:index].T @ features[:index]
        assert float(feature @ covariance.inverse() @ feature) == pytest.approx(float(found[index]))


@pytest.mark.vector("zoo:1.26b")
def test_the_product_of_the_counts() -> None:
    first, rare = functional.count_bonuses(torch.tensor([1, 2, 1, 3]), torch.tensor([4, 5, 1, 9]))
    assert (first * rare).tolist() == [0.5, 0, 1, 0]


@pytest.mark.vector("zoo:1.26c")
def test_counted_rewards_of_an_episode(build: Build) -> None:
    algorithm = build("e3b", episodic="count", across="count", **PLAIN)
    # "a" was seen three times and "b" never; the first observation gives nothing.
    learned(algorithm, walk(["x", "a"]), walk(["y", "A "]), walk(["z", " a"]))
    episode = walk(["o", "a", "a", "b", "a"])
    assert rewards(algorithm, episode) == pytest.approx([0.5, 0, 1, 0])


@pytest.mark.vector("zoo:1.26d")
def test_elliptical_rewards_of_an_episode(build: Build) -> None:
    algorithm = build("e3b", across="none", **PLAIN)
    h = torch.stack([text_features(text) for text in ("mug", "mug", "a pen", "lamp")])
    assert h.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 1])
    wanted = functional.elliptical_bonuses(h, 0.1)[1:].tolist()
    assert wanted[0] == pytest.approx(0.909091, abs=5e-7)
    # Reset per episode: a second one of the same observations gets the same.
    for _ in range(2):
        episode = walk(["mug", "mug", "a pen", "lamp"])
        assert rewards(algorithm, episode) == pytest.approx(wanted)
        learned(algorithm, episode)


def test_the_error_that_grew() -> None:
    found = functional.error_increases(torch.tensor([2.0, 3.0, 0.2, 0.1]), 0.1)
    assert found.tolist() == pytest.approx([0, 2.8, 0, 0.08])
    assert functional.error_increases(torch.zeros(0), 0.1).tolist() == []


def test_random_network_distillation_tires_of_what_it_has_seen() -> None:
    network = RandomNetwork(32, 1e-2, 50)
    seen, other = text_features("a mug on the desk")[None], text_features("the fridge is open")[None]
    before = [float(network.errors(each)) for each in (seen, other)]
    network.learn(seen)
    after = [float(network.errors(each)) for each in (seen, other)]
    assert after[0] < 0.1 * before[0]
    assert after[1] > 5 * after[0]


def test_factors_are_multiplied_or_added() -> None:
    episode = walk(["o", "a", "b c"])

    def found(**settings: str) -> list[float]:
        return rewards(build_recipe("e3b", {**PLAIN, **settings}).build(), episode)

    inner, outer = found(across="none"), found(episodic="none")
    assert found(combine="mult") == pytest.approx([a * b for a, b in zip(inner, outer, strict=True)])
    assert found(combine="add") == pytest.approx([a + b for a, b in zip(inner, outer, strict=True)])
    assert min(outer) > 0


def test_the_bonus_is_in_units_of_its_std_in_earlier_steps() -> None:
    algorithm = build_recipe("e3b", {**PLAIN, "across": "none", "divide_by_std": True}).build()
    plain = build_recipe("e3b", {**PLAIN, "across": "none"}).build()
    episode = walk(["o", "a", "a", "b c"])
    assert rewards(algorithm, episode) == [0, 0, 0]
    learned(algorithm, episode)
    raw = torch.tensor(rewards(plain, episode))
    assert rewards(algorithm, episode) == pytest.approx((raw / raw.std(correction=0)).tolist())


def test_rewards_are_clipped_and_a_coefficient_of_0_changes_nothing() -> None:
    episode = walk(["o", "a", "b"], reward=1.0)
    settings = {**PLAIN, "across": "none"}
    clipped = build_recipe("e3b", {**settings, "reward_range": [-1.0, 1.0]}).build()
    assert rewards(clipped, episode) == [1, 1]
    off = build_recipe("e3b", {**settings, "coefficient": 0.0, "reward_range": [-0.1, 0.1]}).build()
    assert rewards(off, episode) == [0, 1]


def test_episodes_without_turns_or_without_an_observation_after_them() -> None:
    algorithm = build_recipe("e3b", PLAIN).build()
    assert rewards(algorithm, walk(["o"])) == []
    cut = walk(["o", "a", ""], stop=StopReason.ENV_ERROR)
    found = rewards(algorithm, cut)
    assert found[0] > 0
    assert found[1] == 0
    learned(algorithm)  # a step that left nothing
    learned(algorithm, walk(["o"]))


def test_a_branch_counts_the_turns_it_shares_once() -> None:
    algorithm = build_recipe("e3b", {**PLAIN, "episodic": "none", "across": "count"}).build()
    base = walk(["o", "a", "b"])
    branch = replace(walk(["o", "a", "c"]), parent=BranchPoint(base.id, 1))
    learned(algorithm, base, branch)
    # Turn 0 is shared; each has a turn 1 of its own.
    found = rewards(algorithm, walk(["x", "o", "a", "b"]))
    assert found == pytest.approx([2**-0.5, 3**-0.5, 2**-0.5])


def test_its_state_goes_on_bit_for_bit() -> None:
    one, other = (build_recipe("e3b", {"coefficient": 1.0}).build() for _ in range(2))
    episodes = [walk(["o", "a", "b c"]), walk(["o", "the fridge is open", "a"])]
    learned(one, *episodes)
    states = states_of(one.find_stateful())
    for name, component in other.find_stateful().items():
        component.load_state_dict(states[name], Context())
    for _ in range(2):
        assert [rewards(one, each) for each in episodes] == [rewards(other, each) for each in episodes]
        learned(one, *episodes)
        learned(other, *episodes)
    assert list(states_of(one.find_stateful())) == ["novelty"]


def test_a_state_of_other_factors_is_refused() -> None:
    kept = ObservationNovelty("count", "none", "mult", ridge=0.1, share=0.1, divide_by_std=False)
    other = ObservationNovelty("elliptical", "none", "mult", ridge=0.1, share=0.1, divide_by_std=False)
    with pytest.raises(CheckpointError, match="count mult none, wanted elliptical mult none"):
        other.load_state_dict(kept.state_dict(), Context())
    narrow, wide = (
        build_recipe("e3b", {"hidden": size}).build().find_stateful()["novelty"] for size in (4, 8)
    )
    with pytest.raises(CheckpointError, match="another width"):
        wide.load_state_dict(narrow.state_dict(), Context())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodic": "none", "across": "none"}, "wanted at least one factor"),
        ({"reward_range": [1.0, -1.0]}, "wanted the lower bound first"),
        ({"hidden": 0}, "hidden"),
        ({"ridge": 0.0}, "ridge"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe("e3b", settings)


def test_groups_of_equal_returns_are_kept() -> None:
    group = Group("t", (walk(["o", "a"]), walk(["o", "b"])))
    assert list(build_recipe("e3b").build().select([group], Context())) == [group]
    assert observations(group.episodes[0]) == ["o", "a"]
