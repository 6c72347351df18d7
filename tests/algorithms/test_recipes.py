from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint

import pytest
import torch

from agentrl.algorithms import recipe as registry
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.catalogue import list_methods
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.methods.cloning import BehaviourCloning
from agentrl.algorithms.methods.dapo import DAPO
from agentrl.algorithms.methods.gigpo import GiGPO
from agentrl.algorithms.methods.grpo import GRPO, DrGRPO
from agentrl.algorithms.methods.gspo import GSPO
from agentrl.algorithms.methods.ppo import PPO
from agentrl.algorithms.methods.reinforce_pp import ReinforcePlusPlus
from agentrl.algorithms.methods.rloo import RLOO
from agentrl.algorithms.recipe import (
    Base,
    Recipe,
    build_recipe,
    recipe,
    recipe_names,
    recipe_tree,
)
from agentrl.algorithms.stack import build_stack
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.errors import ConfigError

CONTEXT = Context()


def group(*episodes: tuple[float, bool]) -> Group:
    return Group(
        "t",
        tuple(
            Episode(
                f"e{number}",
                "env",
                "t",
                0,
                (
                    Turn(
                        "o",
                        "a",
                        prompt_ids=(1,),
                        action_ids=(2, 3),
                        reward=reward,
                        valid=valid,
                        new_sequence=True,
                    ),
                ),
                StopReason.TERMINATED,
            )
            for number, (reward, valid) in enumerate(episodes)
        ),
    )


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_names()
    monkeypatch.setattr(registry, "_recipes", dict(registry._recipes))
    monkeypatch.setattr(registry, "_broken", {})


def test_the_shipped_recipes_are_found_and_described():
    assert {"grpo", "dr_grpo", "behaviour_cloning"} <= set(recipe_names())
    assert {method.name: method.summary for method in list_methods()}["dr_grpo"] == (
        "GRPO done right: no division by the standard deviation, and no discount for long trajectories."
    )
    assert (GRPO.name, DrGRPO.name) == ("grpo", "dr_grpo")


RECIPES = [GRPO, DrGRPO, PPO, RLOO, ReinforcePlusPlus, GiGPO, DAPO, GSPO]


@pytest.mark.parametrize("recipe_class", RECIPES, ids=lambda cls: cls.name)
def test_a_recipe_is_its_name_and_plain_values(recipe_class):
    made = recipe_class()
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_with_its_defaults(name):
    assert isinstance(build_recipe(name).build(), Algorithm)


def test_plain_values_become_a_recipe():
    made = build_recipe("grpo", {"clip_high": 0.28, "aggregation": "token"})
    assert made == GRPO(clip_high=0.28, aggregation="token")


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"got 'dr_gpro'; did you mean dr_grpo\?"):
        build_recipe("dr_gpro")


def test_every_mistake_in_the_settings_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build_recipe("grpo", {"clip_lo": 0.1, "clip_high": "wide", "aggregation": "mean"})
    for part in ("algorithm.clip_lo", "clip_low", "algorithm.clip_high", "algorithm.aggregation"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"aggregation": "constant"}, "needs sequence_length"),
        ({"clip_low": 1.5}, r"clip_low: wrong value \(got 1.5"),
        ({"clip_high": -0.1}, r"clip_high: wrong value \(got -0.1"),
        ({"dual_clip": 1.1}, "it would undo the first clip"),
        ({"kl_coefficient": -1.0}, r"kl_coefficient: wrong value \(got -1.0"),
        ({"aggregation": "constant", "sequence_length": 0}, r"sequence_length: wrong value \(got 0"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_recipe("grpo", settings)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("ppo", {"gamma_turn": 1.1}, r"gamma_turn: wrong value \(got 1.1"),
        ("ppo", {"lam_turn": -0.1}, r"lam_turn: wrong value \(got -0.1"),
        ("ppo", {"value_clip": 0}, r"value_clip: wrong value \(got 0,"),
        ("ppo", {"value_coefficient": -1}, r"value_coefficient: wrong value \(got -1"),
        ("reinforce_pp", {"gamma": 2}, r"gamma: wrong value \(got 2,"),
        ("reinforce_pp", {"reward_kl_coefficient": -1}, r"reward_kl_coefficient: wrong value \(got -1"),
        ("reinforce_pp", {"baseline": True, "gamma": 0.9}, "wanted neither gamma nor"),
        ("gigpo", {"similarity": 0}, r"similarity: wrong value \(got 0,"),
        ("gigpo", {"step_weight": -1}, r"step_weight: wrong value \(got -1"),
        ("gigpo", {"gamma": 2}, r"gamma: wrong value \(got 2,"),
        ("dapo", {"clip_low": 2}, r"clip_low: wrong value \(got 2,"),
        ("dapo", {"clip_high": -1}, r"clip_high: wrong value \(got -1"),
        ("dapo", {"max_rounds": 0}, r"max_rounds: wrong value \(got 0"),
        ("dapo", {"overlong_limit": 10}, "overlong_cache is 0, wanted above 0"),
        ("dapo", {"overlong_limit": 10, "overlong_cache": 11}, "overlong_cache is 11"),
        ("dapo", {"base": {"name": "behaviour_cloning"}}, "'behaviour_cloning' has no clipped ratio"),
        ("gspo", {"base": {"name": "behaviour_cloning"}}, "'behaviour_cloning' has no clipped ratio"),
        ("dr_bot", {"base": {"name": "kl_cov"}}, "'kl_cov' has no clipped ratio"),
        ("gspo", {"clip_low": 1.5}, r"clip_low: wrong value \(got 1.5, wanted at least 0 and at most 1\)"),
        ("gspo", {"base": {"name": "dapo", "base": {"name": "gspo"}}}, "those of single tokens"),
        ("spear", {"base": {"name": "dr_bot", "base": {"name": "gspo"}}}, "gspo over dr_bot keeps"),
    ],
)
def test_what_a_recipe_cannot_do_is_refused_with_the_reason(name, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_recipe(name, settings)


def test_parity_says_what_it_sets():
    made = build_recipe("grpo", {"parity": "official", "clip_high": 0.28})
    assert made == GRPO(
        clip_high=0.28,
        dual_clip=3.0,
        aggregation="token",
        weighting="row",
        singleton="raw",
        drop_equal_groups=False,
        parity="official",
    )
    critic = build_recipe("ppo", {"parity": "official"})
    assert (critic.gae_scope, critic.bootstrap_truncated) == ("row", False)
    official = build_recipe("dr_grpo", {"parity": "official"})
    assert (official.aggregation, official.weighting) == ("constant", "row")


def test_parity_does_not_overrule_in_silence():
    with pytest.raises(ConfigError, match=r"dual_clip is 10.0, but parity=official sets it to 3.0"):
        build_recipe("grpo", {"parity": "official", "dual_clip": 10})


def test_official_runs_keep_groups_that_all_did_the_same():
    groups = [group((1, True), (1, True)), group((1, True))]
    assert len(prepare(GRPO(parity="official").build(), groups, CONTEXT).episodes) == 3
    assert len(prepare(GRPO().build(), groups, CONTEXT).episodes) == 0


@pytest.mark.usefixtures("own_registry")
def test_two_recipes_of_one_name_are_refused_naming_both():
    with pytest.raises(ConfigError, match=r"agentrl\.algorithms\.methods\.grpo\.GRPO and .*Other"):

        @recipe("grpo")
        @dataclass(frozen=True)
        class Other(Recipe):
            def build(self) -> Algorithm:
                return Algorithm()


@pytest.mark.usefixtures("own_registry")
def test_a_recipe_that_drops_the_temperatures_of_its_base_is_refused():
    def warm(state, context, inner=None):
        return 1.2 if inner is None else 1.2 * inner(state, context)

    @recipe("warming")
    @dataclass(frozen=True)
    class Warming(Recipe):
        base: Base = field(default_factory=lambda: build_recipe("grpo"))
        calls: bool = False

        def build(self) -> Algorithm:
            base = self.base.build()
            hook = partial(warm, inner=base.rollout.reply_temperature) if self.calls else warm
            return replace(base, rollout=replace(base.rollout, reply_temperature=hook))

    hapo = {"name": "hapo", "temperature_change": 0.1}
    warming = {"name": "warming"}
    for outer, inner in ((warming, hapo), (hapo, warming)):
        settings = {key: value for key, value in outer.items() if key != "name"}
        with pytest.raises(
            ConfigError,
            match=f"(warming drops the temperatures .*|hapo:) base '{inner['name']}'",
        ):
            build_recipe(outer["name"], {**settings, "base": inner})
        with pytest.raises(ConfigError, match=r"wanted (one method that sets them|temperature_change=0)"):
            build_stack({"compose": [inner, outer]})
    build_recipe("warming", {"base": hapo, "calls": True})
    build_recipe("warming", {"base": {"name": "hapo"}})
    build_recipe("empg", {"base": hapo})
    build_recipe("distill", {"base": {"name": "empg", "base": hapo}})


@pytest.mark.usefixtures("own_registry")
def test_a_recipe_that_is_no_dataclass_of_its_own_still_needs_to_be_one():
    with pytest.raises(ConfigError, match="is not a dataclass"):
        recipe("plain")(type("Plain", (), {}))


@pytest.mark.usefixtures("own_registry")
def test_a_broken_plugin_hurts_nobody_and_is_reported():
    point = EntryPoint("bad", "agentrl.no_such_module", registry.ENTRY_POINTS)
    with pytest.warns(UserWarning, match="plug-in 'bad'"):
        registry._load(point)
    assert "ModuleNotFoundError" in registry.broken_plugins()["bad"]
    assert isinstance(build_recipe("grpo"), GRPO)
    with pytest.raises(ConfigError, match="plug-in bad failed to load"):
        build_recipe("nothing_like_it")


def outputs(logprobs, entropies=None):
    values = torch.tensor(logprobs)
    return Outputs(values, torch.zeros_like(values) if entropies is None else torch.tensor(entropies))


def test_dr_grpo_centres_only_and_divides_by_a_constant():
    algorithm = DrGRPO(sequence_length=4).build()
    batch = prepare(algorithm, [group((1, True), (0, True))], CONTEXT)
    advantages = algorithm.advantage(batch, CONTEXT)
    assert advantages.tolist() == [[0, 0.5, 0.5], [0, -0.5, -0.5]]
    weights, count = algorithm.aggregation(batch.action_mask, batch.turns, batch.trajectory)
    assert weights.tolist() == [[0, 0.25, 0.25], [0, 0.25, 0.25]]
    assert count == 2


def test_the_invalid_penalty_counts_after_groups_were_dropped():
    algorithm = GRPO(invalid_penalty=0.1, divide_by_std=False).build()
    batch = prepare(algorithm, [group((0, True), (0, False)), group((1, True), (0, False))], CONTEXT)
    assert batch.returns.tolist() == [1, -0.1]
    assert algorithm.advantage(batch, CONTEXT)[:, 1].tolist() == pytest.approx([0.55, -0.55])


def test_coefficients_add_terms_and_requirements():
    algorithm = GRPO(kl_coefficient=0.01, entropy_coefficient=0.02).build()
    assert [(term.name, term.scale(CONTEXT)) for term in algorithm.terms] == [
        ("kl", 0.01),
        ("entropy", -0.02),
    ]
    assert {"reference", "entropy:grad"} <= algorithm.requires
    assert GRPO().build().terms == ()


def test_degenerate_groups_can_be_kept():
    assert (
        len(prepare(GRPO(drop_equal_groups=False).build(), [group((1, True), (1, True))], CONTEXT).episodes)
        == 2
    )


def test_cloning_keeps_every_demonstration_and_is_cross_entropy():
    algorithm = BehaviourCloning().build()
    batch = prepare(algorithm, [group((0, True))], CONTEXT)
    advantages = algorithm.advantage(batch, CONTEXT)
    loss = algorithm.surrogate(outputs([[0.0, -0.5, -1.5]]), MiniBatch(batch, advantages), None)
    assert advantages.tolist() == [[0, 1, 1]]
    assert loss.tolist() == [[0, 0.5, 1.5]]


@pytest.mark.parametrize("name", ["gspo", "dapo", "dr_bot", "aepo"])
def test_what_changes_the_loss_changes_that_of_replayed_rows_inside_and_outside(name):
    spear = build_recipe("spear", {"base": {"name": "grpo"}})
    over = build_recipe(name, {"base": recipe_tree(spear)}).build()
    under = build_recipe("spear", {"base": {"name": name}}).build()
    for algorithm in (over, under):
        assert algorithm.replay is not None
        loss = spear.replay_loss(algorithm)
        assert (loss.ratio, loss.surrogate) == (algorithm.ratio, algorithm.surrogate)
        assert loss.aggregation == algorithm.aggregation
