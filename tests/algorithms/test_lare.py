"""LaRe: the losses of the reward model, its rewards in the advantages, and its memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.features import turn_rewards
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.redistribution import TurnRewards, played_turns
from agentrl.algorithms.stateful import states_of
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, Layout, collate
from agentrl.env import factors, load_plugins
from agentrl.env.factors import PlayedTurn, register_factors
from agentrl.errors import CheckpointError, ConfigError

Build = Callable[..., Algorithm]
REWARDS = [0.1, 0.4, -0.2, 0.3, 0.6]
NOW = Context(step=9, total_steps=10)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose only factor of its own is the number that an action is."""
    load_plugins()  # once per process, and into the real table
    monkeypatch.setattr(factors, "_tables", {})
    register_factors("numbers", {"number": lambda turn: float(turn.action)})


def episode(name: str, actions: Sequence[float], returned: float, **changes: Any) -> Episode:
    turns = tuple(
        Turn(
            f"{name} {index}",
            str(action),
            prompt_ids=(1,),
            action_ids=(2, 3),
            logprobs=(-1.0,) * 2,
            entropies=(1.0,) * 2,
            reward=returned if index == len(actions) - 1 else 0.0,
            new_sequence=index == 0,
        )
        for index, action in enumerate(actions)
    )
    return replace(Episode(name, "numbers", "task", 0, turns, StopReason.TERMINATED), **changes)


def batch_of(*episodes: Episode, layout: Layout = "trajectory") -> Batch:
    return collate([Group("task", episodes)], layout=layout)


def rollout(batch: Batch) -> MiniBatch:
    return MiniBatch(batch, torch.zeros(batch.tokens.shape))


def model_of(algorithm: Algorithm, *, exact: bool = False) -> TurnRewards:
    """The component that remembers; `exact` makes the number of an action its reward."""
    found = algorithm.find_stateful()
    assert "lare" in found
    model = found["lare"]
    assert isinstance(model, TurnRewards)
    if exact:
        own = model._model("numbers", NOW)
        own.network = nn.Sequential(nn.Linear(len(own.factors), 1, dtype=torch.float64))
        with torch.no_grad():
            for values in own.network.parameters():
                values.zero_()
            own.network[0].weight[0, list(own.factors).index("number")] = 1.0
        own.optimizer = torch.optim.Adam(own.network.parameters(), lr=0.01)
    return model


@pytest.mark.vector("zoo:1.27")
@pytest.mark.parametrize(("loss", "wanted"), [("rd", 0.0016), ("rrd", 0.001111), ("rrd_unbiased", -0.020667)])
def test_the_loss_of_an_episode(
    build: Build, loss: str, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three turns are drawn: the first, the third and the last."""
    model = model_of(build("lare", loss=loss, sample=3), exact=True)
    if loss != "rd":
        monkeypatch.setattr(model, "_pick", lambda turns, generator: torch.tensor([0, 2, 4]))
    data = rollout(batch_of(episode("a", REWARDS, 1.0)))
    model.update(data, NOW)
    assert model.metrics(data, NOW)["lare/loss"] == pytest.approx(wanted, abs=5e-7)


def loss_of(rewards: Sequence[float], returned: float, turns: int, *, unbiased: bool) -> float:
    values = torch.tensor([list(rewards)], dtype=torch.float64)
    return float(
        functional.redistribution_loss(
            values,
            torch.ones_like(values, dtype=torch.bool),
            torch.tensor([returned], dtype=torch.float64),
            torch.tensor([turns]),
            unbiased=unbiased,
        )
    )


@pytest.mark.parametrize("sample", [1, 2, 3, 5])
def test_over_all_draws_without_replacement_the_unbiased_loss_is_that_of_all_turns(sample: int) -> None:
    drawn = list(combinations(REWARDS, sample))
    mean = sum(loss_of(each, 1.0, 5, unbiased=True) for each in drawn) / len(drawn)
    exact = loss_of(REWARDS, 1.0, 5, unbiased=False)
    assert exact == pytest.approx(0.0016)
    if sample > 1:  # one draw shows no variance
        assert mean == pytest.approx(exact, abs=1e-12)
        biased = sum(loss_of(each, 1.0, 5, unbiased=False) for each in drawn) / len(drawn)
        assert (biased > exact + 1e-6) is (sample < 5)


def test_so_is_that_over_all_draws_with_replacement() -> None:
    drawn = list(product(REWARDS[:2], repeat=4))
    mean = sum(loss_of(each, 1.0, 2, unbiased=True) for each in drawn) / len(drawn)
    assert mean == pytest.approx(loss_of(REWARDS[:2], 1.0, 2, unbiased=False), abs=1e-12)


@pytest.mark.parametrize(("sample", "different"), [(3, 3), (5, 5), (8, None)])
def test_turns_are_drawn_without_replacement_as_long_as_there_are_enough(
    sample: int, different: int | None
) -> None:
    model = model_of(build_recipe("lare", {"loss": "rrd", "sample": sample}).build())
    pick = model._pick(5, torch.Generator().manual_seed(0)).tolist()
    assert len(pick) == sample
    assert set(pick) <= set(range(5))
    assert different is None or len(set(pick)) == different


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_base_sees_the_rewards_of_the_model_and_the_model_the_returns(layout: Layout) -> None:
    settings = {"base": {"name": "reinforce_pp"}, "warmup": 0, "updates": 1}
    algorithm = build_recipe("lare", settings).build()
    model_of(algorithm, exact=True)
    batch = batch_of(episode("a", REWARDS, 1.0), episode("b", [0.0, 0.5], 0.0), layout=layout)
    shaped = batch_of(
        *(
            replace(each, turns=tuple(replace(turn, reward=float(turn.action)) for turn in each.turns))
            for each in batch.episodes
        ),
        layout=layout,
    )
    found = compute_advantages(algorithm, batch, NOW)
    wanted = compute_advantages(build_recipe("reinforce_pp").build(), shaped, NOW)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert batch.returns.tolist() == [1.0, 0.0]
    assert turn_rewards(batch).sum().item() == 1.0


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_rewards_of_a_batch_are_replaced_where_they_are(layout: Layout) -> None:
    batch = batch_of(episode("a", REWARDS, 1.0), episode("b", [0.0, 0.5], 0.5), layout=layout)
    same = batch.with_rewards(turn_rewards(batch))
    assert torch.equal(same.rewards, batch.rewards)
    assert torch.equal(same.returns, batch.returns)
    assert same.episodes == batch.episodes
    twice = batch.with_rewards(turn_rewards(batch) + 1)
    assert twice.returns.tolist() == [6.0, 2.5]
    assert twice.rewards.sum().item() == 8.5


def test_during_the_warmup_the_rewards_are_those_of_the_environment() -> None:
    algorithm, base = build_recipe("lare", {"warmup": 5}).build(), build_recipe("reinforce_pp").build()
    batch = batch_of(episode("a", REWARDS, 1.0), episode("b", [0.0, 0.5], 0.0))
    for step, equal in ((4, True), (5, False)):
        now = replace(NOW, step=step)
        found = compute_advantages(algorithm, batch, now)
        assert torch.equal(found, compute_advantages(base, batch, now)) is equal


@pytest.mark.parametrize("loss", ["rd", "rrd", "rrd_unbiased"])
def test_it_finds_which_turns_were_worth_something(loss: str) -> None:
    """Each turn with a 1 returns 1; episodes say only how many there were."""
    model = model_of(build_recipe("lare", {"loss": loss, "sample": 3, "updates": 100}).build())
    chosen = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]
    batch = batch_of(*(episode(str(index), each, sum(each)) for index, each in enumerate(chosen)))
    for step in range(5):
        model.update(rollout(batch), replace(NOW, step=step))
    found = turn_rewards(model.redistributed(batch, NOW))
    worth = torch.tensor(chosen, dtype=torch.float64)
    assert float((found - worth).abs().max()) < 0.3
    assert float(found[worth > 0].min()) > float(found[worth == 0].max()) + 0.4


def test_a_restored_model_goes_on_bit_for_bit_and_the_seed_decides_the_first_weights() -> None:
    def fresh() -> TurnRewards:
        return model_of(build_recipe("lare", {"loss": "rrd", "sample": 2}).build())

    def rewards(model: TurnRewards, context: Context = NOW) -> Tensor:
        return turn_rewards(model.redistributed(batch, context))

    batch = batch_of(episode("a", REWARDS, 1.0), episode("b", [0.0, 0.5], 0.0))
    one, other = fresh(), fresh()
    assert torch.equal(rewards(one), rewards(other))
    assert not torch.equal(rewards(fresh(), replace(NOW, seed=1)), rewards(other))
    one.update(rollout(batch), replace(NOW, step=7))
    other.load_state_dict(states_of({"lare": one})["lare"], NOW)
    for model in (one, other):
        model.update(rollout(batch), replace(NOW, step=8))
    assert torch.equal(rewards(one), rewards(other))
    assert not torch.equal(rewards(one), rewards(fresh()))


def test_the_state_of_other_factors_is_refused() -> None:
    model = model_of(build_recipe("lare").build())
    model.update(rollout(batch_of(episode("a", REWARDS, 1.0))), NOW)
    state = model.state_dict()
    register_factors("numbers", {"another": lambda turn: 0.0})
    with pytest.raises(
        CheckpointError, match=r"which now has .*another.*; resume with the factors of the run"
    ):
        model_of(build_recipe("lare").build()).load_state_dict(state, NOW)
    register_factors("numbers", {"another": lambda turn: 0.0})


def test_without_episodes_or_turns_there_is_nothing_to_fit() -> None:
    algorithm = build_recipe("lare", {"warmup": 0}).build()
    model = model_of(algorithm)
    empty = collate([])
    assert compute_advantages(algorithm, empty, NOW).shape == (0, 0)
    for batch in (empty, batch_of(episode("a", [], 0.0))):
        model.update(rollout(batch), NOW)
        assert model.metrics(rollout(batch), NOW) == {}


def test_what_the_base_requires_and_excludes_it_does_too() -> None:
    ppo, lare = (build_recipe(*each).build() for each in (("ppo",), ("lare", {"base": {"name": "ppo"}})))
    assert lare.requires == ppo.requires
    with pytest.raises(ConfigError, match="cannot be combined"):
        build_recipe("empg", {"base": {"name": "lare", "base": {"name": "ppo"}}})


def test_a_turn_is_read_with_what_came_before_and_after_it() -> None:
    first, second = episode("a", [1.0, 2.0], 1.0, final_observation="end").turns
    turns = (replace(first, info={"choices": 4}), replace(second, info={"choices": 6}, valid=False))
    found = played_turns(episode("a", [1.0, 2.0], 1.0, final_observation="end", turns=turns))
    assert found == [
        PlayedTurn("a 0", (), "a 0", "1.0", "a 1", True, 4, 6),
        PlayedTurn("a 0", (("a 0", "1.0"),), "a 1", "2.0", "end", False, 6, None),
    ]
