from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

from agentrl.algorithms import recipe as registry
from agentrl.algorithms.algorithm import Algorithm, Context, MiniBatch, Outputs, prepare
from agentrl.algorithms.cloning import BehaviourCloning
from agentrl.algorithms.grpo import GRPO, DrGRPO
from agentrl.algorithms.recipe import Recipe, build_recipe, describe_recipe, recipe, recipe_names
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
                (Turn("o", "a", prompt_ids=(1,), action_ids=(2, 3), reward=reward, valid=valid, fresh=True),),
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
    assert describe_recipe("dr_grpo") == (
        "GRPO done right: no division by the deviation, and no discount for long trajectories."
    )
    assert (GRPO.name, DrGRPO.name) == ("grpo", "dr_grpo")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_with_its_defaults(name):
    assert isinstance(build_recipe(name).build(), Algorithm)


def test_plain_values_become_a_recipe():
    made = build_recipe("grpo", {"clip_high": 0.28, "aggregation": "token"})
    assert made == GRPO(clip_high=0.28, aggregation="token")


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"got 'gpro'; did you mean grpo\?"):
        build_recipe("gpro")


def test_every_mistake_in_the_settings_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build_recipe("grpo", {"clip_lo": 0.1, "clip_high": "wide", "aggregation": "mean"})
    for part in ("algorithm.clip_lo", "clip_low", "algorithm.clip_high", "algorithm.aggregation"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"aggregation": "constant"}, "needs sequence_length"),
        ({"clip_low": 1.5}, r"clip_low is 1.5, wanted within \[0, 1\]"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"dual_clip": 1.1}, "it would undo the first clip"),
        ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0"),
        ({"aggregation": "constant", "sequence_length": 0}, "sequence_length is 0, wanted at least 1"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_recipe("grpo", settings)


@pytest.mark.usefixtures("own_registry")
def test_two_recipes_of_one_name_are_refused_naming_both():
    with pytest.raises(ConfigError, match=r"agentrl\.algorithms\.grpo\.GRPO and .*Other"):

        @recipe("grpo")
        @dataclass(frozen=True)
        class Other(Recipe):
            def build(self) -> Algorithm:
                return Algorithm()


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
    weights, count = algorithm.aggregation(batch.sampled, batch.turns, batch.trajectory)
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
