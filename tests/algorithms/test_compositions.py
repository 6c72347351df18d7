"""Recipes over recipes: what a hook goes by is what the loss uses in the end."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import with_mask
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, Term, requires
from agentrl.algorithms.methods.dapo import DAPO
from agentrl.algorithms.methods.dr_bot import DrBot
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.methods.gspo import GSPO
from agentrl.algorithms.methods.spear import Spear
from agentrl.algorithms.named_features import with_mini_batch_features
from agentrl.algorithms.recipe import Base, Recipe, build_recipe
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.learn.objective import build_objective

ALL = {"coefficient": 0.0, "tool_reward": 0.0, "covariance_band": [-99.0, 99.0]}


def reply(length: int, reward: float = 0.0, **fields: Any) -> Turn:
    return Turn(
        "o",
        "a",
        prompt_ids=(1,),
        action_ids=(5,) * length,
        logprobs=(-0.4,) * length,
        reward=reward,
        **fields,
    )


def episode(name: str, *turns: Turn) -> Episode:
    return Episode(
        name, "env", "t", 0, (replace(turns[0], new_sequence=True), *turns[1:]), StopReason.TERMINATED
    )


def scored(moves: list[list[float]], *episodes: Episode) -> MiniBatch:
    """A row per episode, each with advantage 1; what the policy says has moved since the scoring pass."""
    batch = collate([Group("t", episodes)])
    old = torch.where(batch.action_mask, -0.5, 0.0).double()
    new = old.clone()
    for row, values in enumerate(moves):
        new[row, batch.action_mask[row]] += torch.tensor(values, dtype=torch.float64)
    batch = replace(batch, old_logprobs=old, old_entropies=old * 0, reference_logprobs=old)
    return MiniBatch(batch, batch.action_mask.double(), Outputs(new, torch.zeros_like(new)))


def left_out(block: dict[str, Any], mini: MiniBatch, context: Context) -> list[list[int]]:
    algorithm = build_recipe(block["name"], {k: v for k, v in block.items() if k != "name"}).build()
    objective = build_objective(mini, algorithm, context)
    return ((objective.factors == 0) & objective.mask).nonzero().tolist()


def over(*names: str, **spear: Any) -> dict[str, Any]:
    """Blocks one inside the other, the outermost first."""
    block: dict[str, Any] = {"name": "grpo"}
    for name in reversed(names):
        block = {"name": name, "base": block} | (spear if name == "spear" else {})
    return block


ORDERS = [
    ("spear", "dr_bot"),
    ("dr_bot", "spear"),
    ("dapo", "dr_bot", "spear"),
    ("dapo", "spear", "dr_bot"),
    ("dr_bot", "dapo", "spear"),
    ("gspo", "dr_bot", "spear"),
    ("gspo", "spear", "dr_bot"),
    ("spear", "gspo", "dr_bot"),
    ("aepo", "dr_bot", "spear"),
    ("dr_bot", "aepo", "spear"),
    ("epo", "dr_bot", "spear"),
    ("empg", "dr_bot", "spear"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_half_of_four_decisions_are_two_in_every_order(order):
    good = [episode("a", reply(2)), episode("b", reply(2))]
    faulty = episode("c", reply(4, finish="length"))
    mini = scored([[0.0, 0.0], [0.0, 0.0], [0.0] * 4], *good, faulty)
    for seed in range(12):
        found = left_out(over(*order, **ALL, covariance_share=0.5), mini, Context(seed=seed))
        assert len(found) == 2
        assert {row for row, _ in found} <= {0, 1}


@pytest.mark.parametrize(
    "order",
    [("gspo", "spear"), ("spear", "gspo"), ("gspo", "dr_bot", "spear"), ("gspo", "dapo", "spear")],
    ids="-".join,
)
def test_a_turn_is_judged_by_the_ratio_that_it_is_trained_on(order):
    # Moves that cancel: a turn's ratio is 1, its tokens' are 1.11 and .90. Moves that do not: it is 1.05,
    # above 1.0004, while the first token's own ratio is 1.
    mini = scored([[0.1, -0.1], [0.0, 0.1]], episode("a", reply(2)), episode("b", reply(2)))
    assert left_out(over(*order, **ALL, covariance_share=1.0), mini, Context()) == [[0, 1], [0, 2]]
    tokens = left_out(over("spear", **ALL, covariance_share=1.0), mini, Context())
    assert tokens == [[0, 1], [0, 2], [1, 1], [1, 2]]  # all within [.8, 1.2]


def test_the_bounds_are_those_of_the_loss():
    # A ratio of 1.25 is above GRPO's bound of 1.2 and below the 1.28 of what is put over it.
    mini = scored([[math.log(1.25)], [0.0]], episode("a", reply(1)), episode("b", reply(1)))
    assert left_out(over("spear", **ALL, covariance_share=1.0), mini, Context()) == [[1, 1]]
    for name in ("dapo", "dr_bot"):
        assert len(left_out(over(name, "spear", **ALL, covariance_share=1.0), mini, Context())) == 2


def test_the_log_counts_the_decisions_of_the_loss():
    good, faulty = episode("a", reply(2)), episode("b", reply(6, finish="length"))
    mini = scored([[0.0] * 2, [0.0] * 6], good, faulty)
    for recipe in (
        DrBot(base=Spear(base=GRPO(), **ALL | {"covariance_band": (-99.0, 99.0)}, covariance_share=0.5)),
        Spear(base=DrBot(), **ALL | {"covariance_band": (-99.0, 99.0)}, covariance_share=0.5),
    ):
        algorithm = recipe.build()
        numbers = {}
        masked = with_mini_batch_features(with_mask(algorithm, mini, Context()), algorithm.requires)
        for diagnostic in algorithm.diagnostics:
            numbers |= diagnostic(masked, Context())
        assert numbers["covariance_clip_share"] == 1 / 2


def test_a_share_is_rounded_down_but_not_for_its_binary_form():
    mini = scored([[0.0] * 100], episode("a", reply(100)))
    # .29 * 100 is 28.999999999999996 in binary.
    assert len(left_out(over("spear", **ALL, covariance_share=0.29), mini, Context())) == 29


@dataclass(frozen=True)
class FirstOnly(Recipe):
    """A mask that a third party puts over any recipe."""

    base: Base = None  # type: ignore[assignment]

    def build(self) -> Algorithm:
        def first(mini: MiniBatch, context: Context) -> torch.Tensor:
            return mini.batch.trajectory[:, None].expand_as(mini.batch.tokens) == 0

        built = self.base.build()
        return replace(built, masks=(*built.masks, first))


def test_what_a_mask_put_over_a_replay_leaves_out_is_not_remembered():
    algorithm = FirstOnly(Spear(base=GRPO(), tool_reward=0.0, covariance_share=0.0)).build()
    mini = scored([[0.0], [0.0]], episode("a", reply(1)), episode("b", reply(1)))
    algorithm.replay.update(with_mask(algorithm, mini, Context()), Context())
    assert [row["episode"] for row in algorithm.replay.state_dict()["rows"]] == ["a"]


def test_groups_are_chosen_with_a_penalty_that_is_put_over_their_choice():
    same = Group("same", (episode("a", reply(6, 1.0)), episode("b", reply(1, 0.0))))
    wider = Group("wider", (episode("c", reply(1, 1.1)), episode("d", reply(1, 0.0))))
    reverse = Group("reverse", (episode("e", reply(1, 1.0)), episode("f", reply(6, 0.0))))
    recipe = DAPO(base=DrBot(keep_groups=0.5), overlong_limit=6, overlong_cache=5)
    # Six tokens cost 1: the returns of `same` are 0 and 0, those of `reverse` 1 and -1.
    assert [group.task for group in recipe.build().select([wider, reverse], Context())] == ["reverse"]
    assert [group.task for group in recipe.build().select([same, wider], Context())] == ["wider"]
    plain = DAPO(base=DrBot(keep_groups=0.5)).build()
    assert [group.task for group in plain.select([wider, reverse], Context())] == ["wider"]


def test_each_hook_sees_what_came_of_the_slots_before():
    seen: dict[str, Any] = {}

    def mask(mini: MiniBatch, context: Context) -> torch.Tensor:
        seen["mask"] = mini.mask, mini.bounds
        return torch.arange(mini.batch.tokens.shape[1]).expand_as(mini.batch.tokens) == 1

    def clip(mini: MiniBatch, context: Context) -> Any:
        seen["clip"] = mini.mask, mini.current.ratio
        return GRPO().build().clip(mini, context)

    @requires("current")
    def weight(mini: MiniBatch, context: Context) -> torch.Tensor:
        seen["weight"] = mini.bounds
        return torch.ones_like(mini.advantages)

    mini = scored([[0.1, 0.2]], episode("a", reply(2)))
    algorithm = replace(GSPO().build(), masks=(mask,), clip=clip, weights=(weight,))
    objective = build_objective(mini, algorithm, Context())
    assert seen["mask"] == (None, None)
    chosen, ratio = seen["clip"]
    assert chosen.tolist() == [[False, True, False]]
    assert ratio[0, 1:].tolist() == pytest.approx([math.exp(0.15)] * 2)
    assert (seen["weight"].lower, seen["weight"].upper) == (0.8, 1.2)
    part = objective.mini.select(torch.tensor([0]))
    assert torch.equal(part.mask, chosen)
    assert torch.equal(part.current.ratio, ratio)


LOSS_SLOTS = ("masks", "ratio", "clip", "surrogate", "aggregation", "weights")


def function_of(value: Any) -> int:
    """The identity of a function, also below `functools.partial`."""
    while isinstance(value, partial):
        value = value.func
    return id(value)


def captured(value: Any) -> Iterator[Any]:
    """Return the values that a component was given when it was built, at any depth."""
    if isinstance(value, partial):
        found = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, Term | Algorithm | ReplayBuffer):
        found = list(vars(value).values())
    else:
        found = list(value) if isinstance(value, tuple) else []
    for item in found:
        yield item
        yield from captured(item)


@pytest.mark.parametrize(
    "order",
    [(name,) for name in ("aepo", "dapo", "dr_bot", "empg", "epo", "gspo", "spear")]
    + [("gspo", "dr_bot", "spear"), ("spear", "gspo", "dapo"), ("epo", "aepo", "spear")],
    ids="-".join,
)
def test_no_component_keeps_a_part_of_the_loss_that_may_be_replaced(order):
    block = over(*order)
    inner = build_recipe(
        block["base"]["name"], {k: v for k, v in block["base"].items() if k != "name"}
    ).build()
    algorithm = build_recipe(block["name"], {k: v for k, v in block.items() if k != "name"}).build()
    for built in (inner, algorithm):
        parts = {slot: function_of(part) for slot, part in built.components() if slot in LOSS_SLOTS}
        for slot, component in algorithm.components():
            # A clip may narrow the one below it; a diagnostic of EMPG knows the advantages of its base.
            mine = {"clip": {"clip"}, "diagnostics": LOSS_SLOTS}.get(slot, ())
            kept = {function_of(item) for item in captured(component)} - {function_of(component)}
            assert {name for name, part in parts.items() if part in kept} <= set(mine), slot


def test_before_a_scoring_pass_the_ratio_of_now_is_one():
    mini = scored([[0.3, -0.3]], episode("a", reply(2)))
    mini = replace(mini, batch=replace(mini.batch, old_logprobs=None))
    filled = build_objective(mini, GRPO().build(), Context()).mini
    assert filled.current.ratio[filled.batch.action_mask].tolist() == [1, 1]
