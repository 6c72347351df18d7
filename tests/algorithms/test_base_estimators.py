"""Base estimators on hand-made episodes, from the record of what was played to the advantage of a token."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare, with_targets
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.methods.dapo import DAPO
from agentrl.algorithms.methods.empg import EMPG
from agentrl.algorithms.methods.gigpo import GiGPO, step_advantage
from agentrl.algorithms.methods.grpo import GRPO, DrGRPO
from agentrl.algorithms.methods.gspo import GSPO
from agentrl.algorithms.methods.ppo import PPO, value_metrics
from agentrl.algorithms.methods.reinforce_pp import ReinforcePlusPlus
from agentrl.algorithms.methods.rloo import RLOO
from agentrl.algorithms.recipe import Recipe
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.objective import build_objective

CONTEXT = Context()
DOUBLE = torch.float64


def turn(decided: str, reward: float = 0.0, *, seen: str = "o", valid: bool = True) -> Turn:
    """One letter per reply token: d for a decision, f for a forced token."""
    return Turn(
        seen,
        "a",
        prompt_ids=(1,),
        action_ids=(5,) * len(decided),
        allowed=tuple(None if letter == "d" else (5,) for letter in decided),
        reward=reward,
        valid=valid,
    )


def episode(
    name: str,
    *turns: Turn,
    stop: StopReason = StopReason.TERMINATED,
    parent: BranchPoint | None = None,
) -> Episode:
    opened = tuple(
        replace(item, new_sequence=item.new_sequence or not index) for index, item in enumerate(turns)
    )
    return Episode(name, "env", "t", 0, opened, stop, parent=parent)


def groups_of(*groups: Sequence[Episode]) -> list[Group]:
    return [Group(f"t{number}", tuple(group)) for number, group in enumerate(groups)]


def outcomes(*groups: Sequence[float]) -> list[Group]:
    """Episodes of one turn with one decision, with the given returns."""
    return groups_of(
        *(
            [episode(f"e{number}.{index}", turn("d", reward)) for index, reward in enumerate(group)]
            for number, group in enumerate(groups)
        )
    )


def keys(batch: Batch) -> list[tuple[str, int, int]]:
    """Of every decision: its episode, its turn, and its place in the reply; in the order of the mask."""
    rows, positions = batch.action_mask.nonzero(as_tuple=True)
    found = []
    for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
        index = int(batch.turns[row, position])
        start = int((batch.turns[row] == index).nonzero()[0, 0])
        found.append((batch.episodes[int(batch.trajectory[row])].id, index, position - start))
    return found


def said(key: tuple[str, int, int], salt: str) -> float:
    return random.Random(f"{key}{salt}").gauss(0, 1)


def scored(batch: Batch, values: Sequence[float] | None = None) -> Batch:
    """What a scoring pass would fill in: a function of the decision alone, NaN wherever none was made."""
    numbers = {}
    for name in ("old_logprobs", "old_entropies", "reference_logprobs", "values"):
        filled = torch.full(batch.logprobs.shape, math.nan)
        filled[batch.action_mask] = torch.tensor([said(key, name) for key in keys(batch)])
        numbers[name] = filled
    if values is not None:
        numbers["values"][batch.action_mask] = torch.tensor(values)
    last = torch.tensor([said((item.id, -1, 0), "last") for item in batch.episodes])
    return replace(batch, last_values=last, **numbers)


def by_decision(batch: Batch, values: Tensor) -> dict[tuple[str, int, int], float]:
    return dict(zip(keys(batch), values[batch.action_mask].tolist(), strict=True))


def estimate(recipe: Recipe, groups: Sequence[Group], values: Sequence[float] | None = None) -> Tensor:
    """Advantages at the decisions, in the order of rows and positions."""
    algorithm = recipe.build()
    batch = scored(collate(groups), values)
    return algorithm.advantage(batch, CONTEXT)[batch.action_mask]


def close(actual: Tensor, expected: Sequence[float], tolerance: float = 5e-9) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=tolerance)


def loss_of(algorithm: Algorithm, batch: Batch, logprobs: Tensor) -> tuple[float, Tensor]:
    """The loss of a whole batch and its gradient by the logprobs."""
    batch = with_targets(algorithm, batch, CONTEXT)
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
    leaf = logprobs.clone().requires_grad_()
    outputs = Outputs(leaf, torch.zeros_like(leaf), values=torch.zeros_like(leaf))
    objective = build_objective(mini, algorithm, CONTEXT)
    loss, _ = objective.contribution(torch.arange(len(batch.tokens)), outputs)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def drawn_groups(draw: random.Random) -> list[Group]:
    """Three groups of three trajectories: forced tokens, turns without decisions, dialogues begun anew."""
    groups = []
    for number in range(3):
        members = []
        for member in range(3):
            turns = tuple(
                replace(
                    turn(
                        "".join(draw.choice("ddf") for _ in range(draw.randint(1, 3))),
                        draw.choice((0.0, 0.0, 0.5, 1.0)),
                        seen=draw.choice(("hall", "halls", "shed")),
                        valid=draw.random() > 0.2,
                    ),
                    new_sequence=draw.random() < 0.2,
                )
                for _ in range(draw.randint(1, 4))
            )
            stop = draw.choice((StopReason.TERMINATED, StopReason.TRUNCATED))
            members.append(episode(f"e{number}.{member}", *turns, stop=stop))
        groups.append(members)
    return groups_of(*groups)


VARIANTS: dict[str, Recipe] = {
    "grpo": GRPO(drop_equal_groups=False),
    "grpo official": GRPO(parity="official", invalid_penalty=0.1),
    "dr_grpo": DrGRPO(drop_equal_groups=False),
    "rloo": RLOO(drop_equal_groups=False),
    "rloo official": RLOO(parity="official", invalid_penalty=0.1),
    "reinforce_pp": ReinforcePlusPlus(gamma=0.9, invalid_penalty=0.1),
    "reinforce_pp kl": ReinforcePlusPlus(gamma=0.9, reward_kl_coefficient=0.1),
    "reinforce_pp official": ReinforcePlusPlus(gamma=0.9, parity="official", invalid_penalty=0.1),
    "reinforce_pp baseline": ReinforcePlusPlus(baseline=True),
    "reinforce_pp baseline official": ReinforcePlusPlus(baseline=True, parity="official"),
    "gigpo": GiGPO(),
    "gigpo mean": GiGPO(divide_by_std=False, similarity=0.8),
    "gigpo official": GiGPO(parity="official", invalid_penalty=0.1),
    "ppo trajectory": PPO(gamma_turn=0.9),
    "ppo turn": PPO(gamma_turn=0.9, gae_scope="turn"),
    "ppo official": PPO(parity="official", invalid_penalty=0.1),
    "dapo": DAPO(),
    "gspo": GSPO(),
}
everything = pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS.keys())


def answers(algorithm: Algorithm, batch: Batch) -> list[dict[tuple[str, int, int], float]]:
    """Advantages, and targets where there are any, by decision."""
    found = [compute_advantages(algorithm, batch, CONTEXT)]
    targets = with_targets(algorithm, batch, CONTEXT).targets
    if targets is not None:
        found.append(targets)
    for values in found:
        assert bool((values[~batch.action_mask] == 0).all())
    return [by_decision(batch, values) for values in found]


def padded(batch: Batch) -> Batch:
    shape = batch.tokens.shape
    wider = {
        item.name: torch.nn.functional.pad(value, (0, 3), value=-1 if item.name == "turns" else 0)
        for item in fields(batch)
        if isinstance(value := getattr(batch, item.name), Tensor) and value.shape == shape
    }
    return replace(batch, allowed=None, **wider)


# What holds for all of them


@everything
def test_the_answer_depends_on_neither_layout_nor_row_order_nor_padding(recipe: Recipe) -> None:
    draw, algorithm, compared = random.Random(1), recipe.build(), 0
    for _ in range(10):
        groups = drawn_groups(draw)
        by_turn = prepare(algorithm, groups, CONTEXT, layout="turn")
        order = random.Random(2).sample(range(len(by_turn.tokens)), len(by_turn.tokens))
        plain, *others = (
            answers(algorithm, scored(batch))
            for batch in (
                prepare(algorithm, groups, CONTEXT),
                by_turn,
                by_turn.select(order),
                padded(by_turn),
            )
        )
        for other in others:
            for wanted, found in zip(plain, other, strict=True):
                assert found == pytest.approx(wanted, abs=1e-6)
        compared += sum(value != 0 for value in plain[0].values())
    assert compared > 50


DEGENERATE = {
    "equal returns": outcomes([0.1 + 0.2, 0.3, 0.3], [0, 0]),
    "groups of one": outcomes([1], [0.5]),
    "one episode": outcomes([1]),
    "one group": groups_of([episode("a", turn("dd", 1.0), turn("f")), episode("b", turn("d"))]),
    "no decisions": groups_of([episode("a", turn("ff", 1.0)), episode("b", turn("f"), turn("f"))]),
    "one without decisions": groups_of([episode("a", turn("f", 1.0)), episode("b", turn("d"))]),
    "all aborted": groups_of([episode("a", turn("d", 1.0), stop=StopReason.ENV_ERROR)]),
    "nothing": [],
}


@everything
@pytest.mark.parametrize("groups", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_batches_give_finite_numbers(recipe: Recipe, groups: list[Group]) -> None:
    algorithm = recipe.build()
    batch = with_targets(algorithm, scored(collate(groups)), CONTEXT)
    advantages = compute_advantages(algorithm, batch, CONTEXT)
    assert bool(advantages.isfinite().all())
    assert batch.targets is None or bool(batch.targets.isfinite().all())
    for diagnostic in algorithm.diagnostics:
        numbers = diagnostic(MiniBatch(batch, advantages), CONTEXT)
        assert all(math.isfinite(value) for value in numbers.values()), numbers


# GRPO and RLOO


def test_group_relative_advantages_of_the_paper_and_of_verl():
    groups = outcomes([1, 0, 0, 1], [5, 5, 5, 5], [2])
    four = [0.8660239, -0.8660239, -0.8660239, 0.8660239]
    close(estimate(GRPO(), groups), [*four, 0, 0, 0, 0, 0], 5e-8)
    close(estimate(DrGRPO(), groups), [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 0])
    close(estimate(GRPO(parity="official"), groups), [*four, 0, 0, 0, 0, 1.999998], 5e-8)
    close(estimate(DrGRPO(parity="official"), groups), [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 2])


LONG_AND_SHORT = groups_of(
    [episode("x", turn("d"), turn("d", 10.0)), episode("y", *(turn("d") for _ in range(6)))]
)


def test_official_group_statistics_count_every_turn():
    close(estimate(GRPO(), LONG_AND_SHORT), [0.70710668] * 2 + [-0.70710668] * 6)
    close(estimate(GRPO(parity="official"), LONG_AND_SHORT), [1.62018482] * 2 + [-0.54006161] * 6)


INVALID = groups_of([episode("a", turn("d", valid=False), turn("d", 1.0)), episode("b", turn("d"))])


@pytest.mark.parametrize(
    ("recipe", "scale"),
    [
        (GRPO(divide_by_std=False, invalid_penalty=0.1, parity="official"), 1),
        (RLOO(invalid_penalty=0.1, parity="official"), 3 / 2),
        # Whitened: squares .64, 1.21 and 3.61 of ninths, by 2
        (ReinforcePlusPlus(invalid_penalty=0.1, parity="official"), (5.46 / 18) ** -0.5),
        (ReinforcePlusPlus(baseline=True, invalid_penalty=0.1, parity="official"), (5.46 / 18) ** -0.5),
    ],
    ids=["grpo", "rloo", "reinforce_pp", "reinforce_pp baseline"],
)
def test_an_official_row_is_scored_with_its_own_invalid_action_only(recipe, scale):
    algorithm = recipe.build()
    batch = prepare(algorithm, INVALID, CONTEXT)
    # Scores .9, 1 and 0, of mean 1.9 / 3
    wanted = [scale * value / 3 for value in (0.8, 1.1, -1.9)]
    close(algorithm.advantage(batch, CONTEXT)[batch.action_mask], wanted, 1e-7)


def test_a_trajectory_pays_for_all_its_invalid_actions():
    algorithm = GRPO(divide_by_std=False, invalid_penalty=0.1).build()
    batch = prepare(algorithm, INVALID, CONTEXT)
    # Returns .9 and 0
    close(algorithm.advantage(batch, CONTEXT)[batch.action_mask], [0.45, 0.45, -0.45])


def test_leave_one_out_advantages():
    close(estimate(RLOO(), outcomes([1, 0, 0, 1])), [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    close(estimate(RLOO(), outcomes([3], [1, 0])), [0, 1, -1])
    close(estimate(RLOO(parity="official"), outcomes([3], [1, 0])), [3, 1, -1])
    # Each of the two rows of x is compared with (10 + 6 * 0) / 7, each of y with (10 + 10 + 5 * 0) / 7.
    close(estimate(RLOO(), LONG_AND_SHORT), [10] * 2 + [-10] * 6)
    close(estimate(RLOO(parity="official"), LONG_AND_SHORT), [60 / 7] * 2 + [-20 / 7] * 6)


# REINFORCE++


@pytest.mark.parametrize("gap", ["ddd", "dfdd", "fddfd"])
def test_token_returns_are_discounted_and_whitened_and_forced_tokens_are_skipped(gap):
    groups = groups_of([episode("a", turn(gap, 1.0)), episode("b", turn("ddf", -0.5))])
    wanted = [0.60411334, 0.72282557, 0.85472805, -1.05785786, -1.1238091]
    close(estimate(ReinforcePlusPlus(gamma=0.9), groups), wanted)


def test_token_returns_flow_through_the_turns_of_a_trajectory():
    groups = groups_of([episode("a", turn("d"), turn("dd", 1.0)), episode("b", turn("dd", -0.5))])
    wanted = [0.60411334, 0.72282557, 0.85472805, -1.05785786, -1.1238091]
    close(estimate(ReinforcePlusPlus(gamma=0.9), groups), wanted)


def test_official_token_returns_begin_anew_in_every_turn_with_the_return_of_the_episode():
    groups = groups_of([episode("a", turn("d"), turn("d", 1.0)), episode("b", turn("d"))])
    # Returns .5, 1, 0: mean .5, variance .25. Official: 1, 1, 0: mean 2/3, variance 1/3.
    close(estimate(ReinforcePlusPlus(gamma=0.5), groups), [0, 1, -1], 1e-7)
    official = ReinforcePlusPlus(gamma=0.5, parity="official")
    close(estimate(official, groups), [1 / 3**0.5, 1 / 3**0.5, -2 / 3**0.5], 1e-7)


def test_the_baseline_variant_whitens_the_centred_returns_over_tokens():
    groups = groups_of([episode("a", turn("ddd", 1.0)), episode("b", turn("dd")), episode("c", turn("d"))])
    wanted = [0.91287091] * 3 + [-0.91287091] * 3
    close(estimate(ReinforcePlusPlus(baseline=True), groups), wanted, 2e-8)
    # A group that differs more has more to say: .5, -.5, 2, -2, of variance 8.5 / 3
    wanted = [value / (8.5 / 3) ** 0.5 for value in (0.5, -0.5, 2, -2)]
    close(estimate(ReinforcePlusPlus(baseline=True), outcomes([1, 0], [4, 0])), wanted, 1e-7)


def test_divergence_from_the_reference_costs_reward():
    algorithm = ReinforcePlusPlus(reward_kl_coefficient=0.5).build()
    assert {"reference", "old_logprobs"} <= algorithm.requires
    batch = scored(collate(outcomes([1, 0, 0])))
    old = torch.where(batch.action_mask, -1.0, math.nan)
    reference = old - torch.tensor([[0.0], [0.0], [1.0]])
    batch = replace(batch, old_logprobs=old, reference_logprobs=reference)
    # Rewards 1, 0 and -.5: mean 1/6, variance 42/72
    wanted = [value / 6 / (42 / 72) ** 0.5 for value in (5, -1, -4)]
    close(algorithm.advantage(batch, CONTEXT)[batch.action_mask], wanted, 1e-7)


# GiGPO

VISITS = groups_of(
    [
        episode("a", turn("d", seen="s0"), turn("d", seen="s1"), turn("d", 1.0, seen="s2")),
        episode("b", turn("d", seen="s0"), turn("d", seen="s0")),
        episode("c", turn("d", seen="s0"), turn("d", 1.0, seen="s1")),
    ]
)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            {"divide_by_std": False},
            [0.77270833, 0.30833333, 0.33333333, -1.12979167, -1.12979167, 0.82020833, 0.35833333],
        ),
        (
            {"divide_by_std": False, "parity": "official"},
            [0.72508929, 0.26071429, 0.28571429, -1.17741071, -1.17741071, 0.77258929, 0.31071429],
        ),
        ({}, [1.39842193, -0.12973751, 0.57734927, -2.02015351, -2.02015351, 1.48718654, 1.28443605]),
        (
            {"parity": "official"},
            [1.40661151, -0.12154794, 0.58553884, -2.32930208, -2.32930208, 1.49537612, 1.29262563],
        ),
    ],
    ids=["mean", "mean official", "mean_std", "mean_std official"],
)
def test_episode_and_step_advantages_add_up(settings, wanted):
    close(estimate(GiGPO(**settings), VISITS), wanted)


def test_the_numbers_say_what_each_level_contributes():
    algorithm = GiGPO(divide_by_std=False).build()
    batch = scored(collate(VISITS))
    numbers = algorithm.diagnostics[-1](MiniBatch(batch, batch.logprobs), CONTEXT)
    # Step part: .439375, -.025, 0, twice -.463125, .486875 and .025. Episode part: 1/3, -2/3, 1/3.
    assert numbers == pytest.approx(
        {"advantage_episode": 3 / 7, "advantage_step": 1.9025 / 7, "states_shared": 6 / 7}
    )


def test_the_step_penalty_reaches_the_step_returns():
    groups = groups_of([episode("a", turn("d", 1.0, valid=False)), episode("b", turn("d", 1.0))])
    algorithm = GiGPO(divide_by_std=False, invalid_penalty=0.1).build()
    batch = prepare(algorithm, groups, CONTEXT)
    # Both levels see .9 and 1: twice -.05 and .05
    close(algorithm.advantage(batch, CONTEXT)[batch.action_mask], [-0.1, 0.1])


LATE = groups_of(
    [
        episode("a", turn("d", seen="s0"), turn("d", 1.0, seen="s1", valid=False)),
        episode("b", turn("d", seen="s0")),
    ]
)


@pytest.mark.parametrize(
    "released", [{"parity": "official"}, {"preset": "released"}], ids=["parity", "preset"]
)
def test_a_released_penalty_is_taken_off_its_own_row_after_discounting(released):
    settings = {"divide_by_std": False, "gamma": 0.5, "invalid_penalty": 0.1}
    batch = prepare(GiGPO(**settings).build(), LATE, CONTEXT)
    ours, theirs = (
        GiGPO(**settings, **extra).build().advantage(batch, CONTEXT)[batch.action_mask]
        for extra in ({}, released)
    )
    # In s0: returns .5 * .9 = .45 and 0; in s1 one turn alone. Episodes: .9 and 0.
    close(ours, [0.45 + 0.225, 0.45, -0.45 - 0.225])
    # In s0: .5 * 1 = .5 and 0, as the penalty is that of the second row alone. Rows: 1, .9 and 0.
    close(theirs, [1 - 1.9 / 3 + 0.25, 0.9 - 1.9 / 3, -1.9 / 3 - 0.25])
    # Two penalised turns in one state differ by their own penalties only.
    again = groups_of([episode("a", turn("d", 1.0, valid=False)), episode("b", turn("d", 1.0))])
    batch = prepare(GiGPO(**settings).build(), again, CONTEXT)
    close(GiGPO(**settings, **released).build().advantage(batch, CONTEXT)[batch.action_mask], [-0.1, 0.1])


def test_turns_are_grouped_by_what_was_seen_and_by_the_state_key_where_that_is_asked_for():
    def seen(text: str, key: int | None, reward: float) -> Turn:
        return replace(turn("d", reward, seen=text), info={"state_key": key})

    groups = groups_of(
        [
            episode("a", seen("hall", 1, 1.0)),
            episode("b", seen("hall", 2, 0.0)),
            episode("c", seen("barn", 2, 0.5)),
            episode("d", seen("shed", None, 0.0)),
        ]
    )
    episodes = [0.625, -0.375, 0.125, -0.375]
    for settings in ({}, {"preset": "paper", "invalid_penalty": 0.0, "kl_coefficient": 0.0}):
        wanted = [value + step for value, step in zip(episodes, [0.5, -0.5, 0, 0], strict=True)]
        close(estimate(GiGPO(divide_by_std=False, **settings), groups), wanted)
    close(
        estimate(GiGPO(divide_by_std=False, parity="official"), groups),
        [value + step for value, step in zip(episodes, [0.5, -0.5, 0, 0], strict=True)],
    )
    recipe = GiGPO(divide_by_std=False, state="state_key")
    wanted = [value + step for value, step in zip(episodes, [0, -0.25, 0.25, 0], strict=True)]
    close(estimate(recipe, groups), wanted)
    batch = scored(collate(groups))
    numbers = recipe.build().diagnostics[-1](MiniBatch(batch, batch.logprobs), CONTEXT)
    assert (numbers["states_named"], numbers["states_shared"]) == (0.75, 0.5)
    assert "states_named" not in GiGPO().build().diagnostics[-1](MiniBatch(batch, batch.logprobs), CONTEXT)


def test_a_state_key_that_no_environment_gives_is_refused():
    with pytest.raises(RequirementError, match="no turn of 'env' has one"):
        estimate(GiGPO(state="state_key"), VISITS)
    with pytest.raises(ConfigError, match="compares observations, wanted 1 with state=state_key"):
        GiGPO(state="state_key", similarity=0.9)


CLIPPED = [GRPO, DrGRPO, RLOO, ReinforcePlusPlus, GiGPO, PPO]


@pytest.mark.parametrize("recipe", CLIPPED, ids=lambda cls: cls.name)
def test_a_released_divergence_is_held_within_ten(recipe):
    batch = collate(outcomes([1, 0, 0]))
    batch = replace(batch, reference_logprobs=torch.where(batch.action_mask, -1.0, 0.0))
    said = batch.logprobs.clone()
    said[batch.action_mask] = torch.tensor([-6.0, -1.2, 24.0])
    # Log-ratios -5, -.2 and 25: exp(5) - 5 - 1, exp(.2) - .2 - 1, and exp(-20) + 25 - 1 for exp(-25) + 25 - 1
    whole = [math.exp(5) - 6, math.exp(0.2) - 1.2, 24]
    held = [10, math.exp(0.2) - 1.2, 10]
    for extra, wanted in (
        ({}, whole),
        ({"preset": "paper"}, whole),
        ({"preset": "released"}, held),
        ({"parity": "official"}, held),
    ):
        leaf = said.clone().requires_grad_()
        term = recipe(kl_coefficient=0.1, **extra).build().terms[0]
        loss = term.loss(Outputs(leaf, torch.zeros_like(leaf)), MiniBatch(batch, said), CONTEXT)
        close(loss[batch.action_mask], wanted, 1e-4)
        loss.sum().backward()
        assert (leaf.grad[batch.action_mask] != 0).tolist() == [wanted is whole, True, wanted is whole]
    k2 = recipe(kl_coefficient=0.1, kl_estimator="k2", preset="released").build().terms[0]
    found = k2.loss(Outputs(said, said), MiniBatch(batch, said), CONTEXT)
    close(found[batch.action_mask], [12.5, 0.02, 312.5], 1e-5)


def test_successes_of_different_length_still_differ_by_their_steps():
    groups = groups_of(
        [
            episode("a", turn("d", 1.0, seen="hall")),
            episode("b", turn("d", seen="hall"), turn("d", 1.0, seen="shed")),
        ]
    )
    algorithm = GiGPO(divide_by_std=False).build()
    batch = prepare(algorithm, groups, CONTEXT)
    # In the hall the returns are 1 and .95
    close(algorithm.advantage(batch, CONTEXT)[batch.action_mask], [0.025, -0.025, 0])


def test_episodes_of_one_turn_have_their_advantage_twice():
    groups = outcomes([1, 0, 0, 1])
    close(estimate(GiGPO(divide_by_std=False), groups), [1, -1, -1, 1])
    close(estimate(GiGPO(), groups), (2 * estimate(GRPO(), groups)).tolist(), 1e-12)


def test_similar_observations_are_compared_when_asked():
    groups = groups_of(
        [episode("a", turn("d", 1.0, seen="a red mug")), episode("b", turn("d", seen="a red cup"))]
    )
    apart = GiGPO(divide_by_std=False)
    close(estimate(apart, groups), [0.5, -0.5])
    close(estimate(replace(apart, similarity=0.7), groups), [1, -1])


def test_a_turn_that_branches_share_counts_once():
    shared = turn("d", seen="hall")
    groups = groups_of(
        [
            episode("root", shared, turn("d", 1.0, seen="shed")),
            episode("child", shared, turn("d", seen="barn"), parent=BranchPoint("root", 1)),
            episode("other", turn("d", 1.0, seen="hall")),
        ]
    )
    recipe = GiGPO(divide_by_std=False, gamma=1.0)
    step = estimate(recipe, groups) - estimate(DrGRPO(), groups)
    # In the hall: returns 1 and 0 by one half each, and 1: mean .75
    close(step, [0.25, 0, -0.75, 0, 0.25])


def test_an_aborted_branch_between_leaves_what_branches_share_counted_once():
    shared = turn("d", seen="hall")
    groups = groups_of(
        [
            episode("root", shared, turn("d", 1.0, seen="shed")),
            episode("gone", shared, turn("d"), stop=StopReason.ENV_ERROR, parent=BranchPoint("root", 1)),
            episode("late", shared, turn("d", seen="barn"), turn("d"), parent=BranchPoint("gone", 2)),
            episode("other", turn("d", 1.0, seen="hall")),
        ]
    )
    step = estimate(GiGPO(divide_by_std=False, gamma=1.0), groups) - estimate(DrGRPO(), groups)
    # In the hall: returns 1 and 0 by one half each, and 1: mean .75
    close(step, [0.25, 0, -0.75, 0, 0, 0.25])
    flat = EMPG(base=DrGRPO(), k=0, k_future=0, zeta=0).build()
    batch = scored(collate(groups))
    # 1/3, -2/3 and 1/3 over 1.5, 2.5 and 1 turns: mean -.8333 / 5
    wanted = [value + 1 / 6 for value in (1 / 3, 1 / 3, -2 / 3, -2 / 3, -2 / 3, 1 / 3)]
    close(compute_advantages(flat, batch, CONTEXT)[batch.action_mask], wanted, 1e-6)


def test_a_state_visited_once_before_a_branch_gives_nothing():
    shared = turn("d", seen="hall")
    groups = groups_of(
        [
            episode("root", shared, turn("d", 1.0, seen="shed")),
            episode("child", shared, turn("d", seen="barn"), parent=BranchPoint("root", 1)),
        ]
    )
    batch = prepare(GiGPO().build(), groups, CONTEXT)
    for divide_by_std in (True, False):
        step = step_advantage(batch, CONTEXT, states="states", gamma=1.0, divide_by_std=divide_by_std)
        assert not step.any()


@pytest.mark.parametrize("parity", ["paper", "official"])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_without_step_weight_it_is_grpo(parity, divide_by_std):
    draw = random.Random(3)
    settings = {"parity": parity, "divide_by_std": divide_by_std, "invalid_penalty": 0.1}
    for _ in range(5):
        groups = drawn_groups(draw)
        plain, both = (
            GRPO(drop_equal_groups=False, **settings).build(),
            GiGPO(step_weight=0, **settings).build(),
        )
        batch = prepare(plain, groups, CONTEXT)
        difference = both.advantage(batch, CONTEXT) - plain.advantage(batch, CONTEXT)
        assert difference.abs().max() < 1e-12


# PPO


def ppo_estimates(recipe: PPO, groups: Sequence[Group], values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Advantages before whitening and returns, at the decisions."""
    batch = scored(collate(groups), values)
    advantages, returns = recipe.estimate()(batch)
    return advantages[batch.action_mask], returns[batch.action_mask]


def test_the_trajectory_scope_discounts_between_turns_only():
    groups = groups_of([episode("a", turn("ddf", 0.5), turn("dfd", 1.0))])
    recipe = PPO(gamma_turn=0.95, lam_turn=0.9)
    advantages, returns = ppo_estimates(recipe, groups, [0.3, 0.4, 0.5, 0.6])
    close(advantages, [1.1025, 1.0025, 0.5, 0.4], 1e-6)
    close(returns, [1.4025, 1.4025, 1, 1], 1e-6)


def test_the_turn_scope_values_a_turn_at_its_first_decision():
    groups = groups_of([episode("a", turn("d"), turn("fdd"), turn("ddf", 1.0))])
    recipe = PPO(gae_scope="turn")
    advantages, returns = ppo_estimates(recipe, groups, [0.3, 0.5, 9.0, 0.6, 9.0])
    close(advantages, [0.656, 0.48, 0.48, 0.4, 0.4], 1e-6)
    close(returns, [0.956, 0.98, 0.98, 1, 1], 1e-6)


def test_the_official_scope_is_the_return_of_the_episode_less_the_value():
    groups = groups_of([episode("a", turn("dd"), turn("d", 10.0))])
    advantages, returns = ppo_estimates(PPO(parity="official"), groups, [0.2, 0.4, 1.0])
    close(advantages, [9.8, 9.6, 9.0], 1e-6)
    close(returns, [10, 10, 10])
    penalised = PPO(parity="official", invalid_penalty=0.1)
    batch = prepare(penalised.build(), INVALID, CONTEXT)
    close(penalised.estimate()(scored(batch, [0.5] * 3))[1][batch.action_mask], [0.9, 1, 0])


@pytest.mark.parametrize("scope", ["trajectory", "turn"])
@pytest.mark.parametrize("stop", [StopReason.TRUNCATED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT])
def test_what_a_limit_cut_off_is_worth_its_last_value(scope, stop):
    groups = groups_of([episode("a", turn("df"), stop=stop), episode("b", turn("d"))])
    batch = replace(scored(collate(groups), [0.2, 0.2]), last_values=torch.tensor([0.7, 0.7]))
    for bootstrap, wanted in ((True, [0.43, -0.2]), (False, [-0.2, -0.2])):
        recipe = PPO(gae_scope=scope, gamma_turn=0.9, bootstrap_truncated=bootstrap)
        close(recipe.estimate()(batch)[0][batch.action_mask], wanted, 1e-6)


def test_advantages_are_whitened_and_returns_are_not():
    groups = groups_of([episode("a", turn("dd", 1.0)), episode("b", turn("d"))])
    algorithm = PPO().build()
    batch = with_targets(algorithm, scored(collate(groups), [0.0, 0.0, 0.0]), CONTEXT)
    # 1, 1 and 0: mean 2/3, variance 1/3
    close(algorithm.advantage(batch, CONTEXT)[batch.action_mask], [1 / 3**0.5, 1 / 3**0.5, -2 / 3**0.5], 1e-7)
    assert batch.targets is not None
    assert batch.targets[batch.action_mask].tolist() == [1, 1, 0]


def test_a_value_of_nothing_leaves_undiscounted_token_returns():
    draw = random.Random(4)
    for _ in range(5):
        batch = scored(collate(drawn_groups(draw)))
        batch = replace(batch, values=torch.zeros_like(batch.logprobs))
        critic = PPO(gamma_turn=1.0, lam_turn=1.0, bootstrap_truncated=False).build()
        plain = ReinforcePlusPlus().build()
        assert (critic.advantage(batch, CONTEXT) - plain.advantage(batch, CONTEXT)).abs().max() < 1e-12


def test_turns_of_one_decision_make_both_scopes_the_same():
    groups = groups_of([episode("a", turn("df"), turn("d", 0.5), turn("fd", 1.0)), episode("b", turn("d"))])
    batch = scored(collate(groups))
    by_turn, by_token = (
        PPO(gamma_turn=0.9, gae_scope=scope).estimate()(batch) for scope in ("turn", "trajectory")
    )
    for one, other in zip(by_turn, by_token, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_the_value_loss_is_clipped_around_the_scored_values_and_adds_up_over_parts():
    groups = outcomes([0.9, 0, 0.5, 1])
    algorithm = PPO(value_clip=0.2, value_coefficient=0.5).build()
    batch = with_targets(algorithm, scored(collate(groups), [0.5] * 4), CONTEXT)
    mini = MiniBatch(batch, torch.zeros_like(batch.logprobs))
    objective = build_objective(mini, algorithm, CONTEXT)
    values = torch.tensor([[0.0, 1.0], [0, 0.2], [0, 0.5], [0, 0.6]], requires_grad=True)
    total = torch.zeros(())
    for rows in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        old = torch.where(batch.action_mask, batch.old_logprobs, 0.0)[rows]
        loss, _ = objective.contribution(rows, Outputs(old, torch.zeros_like(old), values=values[rows]))
        total = total + loss
    # Squares .04 (held at .7), .09 (held at .3), 0 and .16; halved, averaged, times the coefficient .5
    assert total.item() == pytest.approx(0.5 * 0.5 * 0.29 / 4)
    total.backward()
    # Nothing pulls where the held value is further off; the last is pulled by .5 * (.6 - 1) / 4.
    assert values.grad[:, 1].tolist() == pytest.approx([0, 0, 0, -0.05])


def test_the_learner_must_hold_a_value_head():
    assert {"values", "values:grad"} <= PPO().build().requires


def test_explained_variance_by_hand():
    batch = scored(collate(outcomes([0, 1])), [0.0, 0.5])
    batch = replace(batch, targets=torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    numbers = value_metrics(MiniBatch(batch, batch.logprobs), CONTEXT)
    # Of a variance of .25, the errors 0 and .5 leave .0625
    assert numbers == {"value_mean": 0.25, "return_mean": 0.5, "explained_variance": 0.75}
    constant = replace(batch, targets=torch.ones(2, 2))
    assert "explained_variance" not in value_metrics(MiniBatch(constant, batch.logprobs), CONTEXT)


@pytest.mark.parametrize("scope", ["trajectory", "turn", "row"])
def test_entropy_modulation_of_turns_is_refused_over_a_critic(scope):
    with pytest.raises(ConfigError, match="cannot be combined with advantage"):
        EMPG(base=PPO(gae_scope=scope)).build()


# DAPO


def test_dapo_with_equal_bounds_is_its_base():
    draw = random.Random(5)
    base = GRPO(clip_low=0.2, clip_high=0.2, aggregation="token", dual_clip=3.0, entropy_coefficient=0.01)
    recipes = (base, DAPO(base=base, clip_low=0.2, clip_high=0.2))
    for _ in range(5):
        groups = drawn_groups(draw)
        results = []
        for recipe in recipes:
            algorithm = recipe.build()
            batch = scored(prepare(algorithm, groups, CONTEXT))
            moved = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
            results.append(
                loss_of(algorithm, batch, torch.where(batch.action_mask, batch.old_logprobs, 0) + moved)
            )
        (loss, slope), (other_loss, other_slope) = results
        assert loss == pytest.approx(other_loss, abs=1e-12)
        assert (slope - other_slope).abs().max() < 1e-12
        assert slope.abs().max() > 0


def test_dapo_raises_the_upper_bound_keeps_the_dual_clip_and_takes_the_token_mean():
    algorithm = DAPO(base=GRPO(dual_clip=3.0)).build()
    batch = scored(collate(outcomes([1, 0])))
    bounds = algorithm.clip(MiniBatch(batch, batch.logprobs), CONTEXT)
    assert (bounds.lower, bounds.upper, bounds.dual) == (0.8, 1.28, 3.0)
    assert algorithm.aggregation is functional.token_weights


def test_dapo_compares_returns_before_any_penalty():
    equal = [episode("a", turn("d", 1.0, valid=False)), episode("b", turn("d", 1.0))]
    base = GRPO(drop_equal_groups=False, invalid_penalty=0.1)
    algorithm = DAPO(base=base).build()
    assert len(prepare(base.build(), groups_of(equal), CONTEXT).episodes) == 2
    assert len(prepare(algorithm, groups_of(equal), CONTEXT).episodes) == 0
    assert len(prepare(algorithm, [*groups_of(equal), *outcomes([1, 0])], CONTEXT).episodes) == 2
    assert algorithm.rollout.rounds == 3


@dataclass(frozen=True)
class FirstGroup(Recipe):
    def build(self) -> Algorithm:
        return Algorithm(select=lambda groups, context: groups[:1])


def test_dapo_lets_its_base_choose_among_the_groups_that_differ():
    equal, first, second = outcomes([1, 1], [1, 0], [2, 0])
    kept = DAPO(base=FirstGroup()).build().select([equal, first, second], CONTEXT)
    assert kept == [first]


def test_dapo_takes_the_overlong_penalty_off_the_last_reward():
    algorithm = DAPO(base=GRPO(invalid_penalty=0.5), overlong_limit=6, overlong_cache=4).build()
    long = episode("a", turn("dfd", 1.0, valid=False), turn("dd", 1.0))
    batch = prepare(algorithm, groups_of([long, episode("b", turn("dd"))]), CONTEXT)
    # Five tokens are three into the last four of six; two tokens are none.
    assert [[turn.reward for turn in item.turns] for item in batch.episodes] == [[0.5, 0.25], [0]]
    assert algorithm.select(groups_of([long, replace(long, id="c")]), CONTEXT) == []


# GSPO


@pytest.mark.parametrize(
    ("low", "high", "loss", "slopes"),
    [
        (0.2, 0.2, -0.0144412963, (-0.17231585, 0.25125313)),
        (3e-4, 4e-4, 0.0023062604, (0.0, 0.25125313)),
    ],
)
def test_sequence_clipping_of_the_specification(low, high, loss, slopes):
    algorithm = GSPO(base=GRPO(divide_by_std=False), clip_low=low, clip_high=high).build()
    groups = groups_of([episode("a", turn("dfdd", 1.0)), episode("b", turn("dd", -1.0))])
    batch = collate(groups)
    old, new = torch.zeros(2, *batch.tokens.shape, dtype=DOUBLE)
    old[batch.action_mask] = torch.tensor([-1, -2, -1, -1, -1], dtype=DOUBLE)
    new[batch.action_mask] = torch.tensor([-0.9, -2.3, -0.7, -0.99, -1], dtype=DOUBLE)
    batch = replace(batch, logprobs=old, old_logprobs=old)
    found, gradient = loss_of(algorithm, batch, new)
    assert found == pytest.approx(loss, abs=5e-11)
    close(gradient[batch.action_mask], [slopes[0]] * 3 + [slopes[1]] * 2)


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_every_turn_of_a_dialogue_has_a_ratio_of_its_own(layout):
    algorithm = GSPO().build()
    batch = collate(groups_of([episode("a", turn("dd"), turn("d"))]), layout=layout)
    old = torch.zeros(batch.tokens.shape)
    outputs = Outputs(torch.where(batch.turns == 0, 0.1, 0.3), old)
    ratio = algorithm.ratio(outputs, MiniBatch(replace(batch, old_logprobs=old), old))
    close(ratio[batch.action_mask], [math.exp(0.1)] * 2 + [math.exp(0.3)], 1e-6)


def test_turns_of_one_decision_make_it_the_plain_clip():
    groups = groups_of([episode("a", turn("df", 1.0), turn("d")), episode("b", turn("fd"))])
    plain = GRPO(aggregation="sequence", sequence="turn").build()
    whole = GSPO(clip_low=0.2, clip_high=0.2).build()
    batch = scored(collate(groups))
    new = torch.where(batch.action_mask, batch.old_logprobs, 0.0) + torch.linspace(
        -1, 1, batch.tokens.shape[1]
    )
    (loss, slope), (other, other_slope) = (loss_of(algorithm, batch, new) for algorithm in (plain, whole))
    assert loss == pytest.approx(other, abs=1e-12)
    torch.testing.assert_close(slope, other_slope, rtol=0, atol=1e-12)


def test_sequence_ratios_go_over_dynamic_sampling_and_not_under_it():
    algorithm = GSPO(base=DAPO(base=GiGPO())).build()
    batch = scored(collate(outcomes([1, 0])))
    bounds = algorithm.clip(MiniBatch(batch, batch.logprobs), CONTEXT)
    assert (bounds.lower, bounds.upper, bounds.dual) == (1 - 3e-4, 1 + 4e-4, None)
    assert algorithm.rollout.rounds == 3
    assert algorithm.select(outcomes([1, 1]), CONTEXT) == []
    with pytest.raises(ConfigError, match="its bounds are those of single tokens"):
        DAPO(base=GSPO()).build()
