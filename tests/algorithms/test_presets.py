"""`preset: paper | released | ours`: what each says, who wins, and that the docstrings say the same."""

import inspect
import re
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest

from agentrl.algorithms import recipe as registry
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.aepo import AEPO
from agentrl.algorithms.methods.dr_bot import DrBot
from agentrl.algorithms.methods.epo import EPO
from agentrl.algorithms.methods.fr3e import FR3E
from agentrl.algorithms.methods.gigpo import GiGPO
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.methods.gspo import GSPO
from agentrl.algorithms.methods.rloo import RLOO
from agentrl.algorithms.methods.spear import Spear
from agentrl.algorithms.recipe import (
    Presets,
    Recipe,
    build_recipe,
    preset_overrides,
    preset_values,
    recipe,
    recipe_class,
    recipe_names,
    recipe_tree,
)
from agentrl.errors import ConfigError

PRESETS = ("paper", "released", "ours")
SHIPPED = [name for name in recipe_names() if recipe_class(name).__module__.startswith("agentrl.")]


def made(name: str, **settings: Any) -> Recipe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of EPO's own penalty
        return build_recipe(name, settings)


def without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def test_there_is_a_preset_for_every_shipped_recipe():
    assert len(SHIPPED) == 58
    assert all(build_recipe(name).preset == "ours" for name in SHIPPED)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_preset_sets_its_values_and_the_resolved_recipe_reads_back(name, preset):
    recipe = made(name, preset=preset)
    assert isinstance(recipe.build(), Algorithm)
    tree = recipe_tree(recipe)
    assert tree["preset"] == preset
    assert made(**tree) == recipe
    wanted, ours = preset_values(type(recipe), preset), build_recipe(name)
    for item in fields(recipe):
        value = getattr(recipe, item.name)
        if isinstance(value, Recipe):
            block = wanted.get(item.name, recipe_tree(getattr(ours, item.name)))
            assert value == made(**block)
        elif item.name != "preset":
            assert value == wanted.get(item.name, getattr(ours, item.name)), item.name
    assert preset_overrides(recipe) == []


def table_of(name: str) -> dict[str, list[str]]:
    """The rows of the table in a recipe's docstring, by field."""
    told = inspect.getdoc(recipe_class(name)) or ""
    found = re.search(r"^ +field +\| paper +\| released +\| ours *\n((?: +\S+ +\|.*\n)+)", told, re.MULTILINE)
    assert found, f"{name}: no table of presets"
    rows = [[cell.strip() for cell in line.split("|")] for line in found[1].splitlines()]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1:] for row in rows}


def shown(recipe: Recipe, path: str) -> str:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_docstring_shows_the_presets_side_by_side_as_they_are(name):
    table = table_of(name)
    recipes = [made(name, preset=preset) for preset in PRESETS]
    for path, cells in table.items():
        assert cells == [shown(recipe, path) for recipe in recipes], path
    wanted: set[str] = set()
    for preset in PRESETS:
        for field, value in preset_values(recipe_class(name), preset).items():
            inner = value if isinstance(value, dict) else {}
            wanted |= {f"{field}.{key}" for key in inner} if inner else {field}
    assert wanted <= set(table)


def test_the_values_of_the_papers():
    gigpo, rloo = GiGPO(preset="paper"), RLOO(preset="paper")
    assert (gigpo.sequence, gigpo.kl_coefficient, gigpo.invalid_penalty) == ("turn", 0.01, 0.1)
    assert (rloo.aggregation, rloo.sequence, rloo.sequence_length) == ("constant", "turn", 1)
    assert made("grpo", preset="paper").kl_coefficient == 0.04
    doctor = made("dr_grpo", preset="paper")
    assert (doctor.sequence_length, doctor.divide_by_std, doctor.kl_coefficient) == (3000, False, 0.0)
    bot, spear = DrBot(preset="paper"), Spear(preset="paper")
    assert (bot.sequence, bot.sequence_length, bot.keep_groups) == ("turn", 512, 0.75)
    assert (spear.buffer_size, spear.warmup, spear.baseline_size, spear.base) == (2048, 200, 10240, bot)
    ours = Spear()
    assert (ours.buffer_size, ours.warmup, ours.base.sequence_length) == (32, 30, 32)
    assert (GiGPO().sequence, RLOO().sequence, made("dr_grpo").sequence_length) == ("trajectory",) * 2 + (32,)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gigpo", "ppo", "rloo", "reinforce_pp"])
def test_parity_is_the_released_preset(name):
    parity, preset = made(name, parity="official"), made(name, preset="released")
    assert parity.preset == preset.preset == "released"
    assert without(recipe_tree(parity), "parity") == without(recipe_tree(preset), "parity")


def test_parity_leaves_what_it_always_left_to_the_settings():
    spear = Spear(parity="official")
    assert without(recipe_tree(spear), "parity", "preset") == without(
        recipe_tree(Spear()), "parity", "preset"
    )
    assert (FR3E(parity="official").bases, FR3E(preset="released").bases) == (1, 4)
    assert EPO(parity="official").base == EPO().base != EPO(preset="released").base
    assert (AEPO(parity="official").allocation_slope, AEPO(preset="released").allocation_slope) == (4.0, 0.5)


def test_a_given_value_wins_over_the_preset_however_it_is_given():
    for each in (
        made("grpo", preset="released", dual_clip=None, weighting="trajectory"),
        GRPO(preset="released", dual_clip=None, weighting="trajectory"),
    ):
        assert (each.dual_clip, each.weighting, each.singleton) == (None, "trajectory", "raw")
    assert GRPO(0.1, preset="paper").clip_low == 0.1
    # That it is the default makes it no less given.
    assert made("spear", preset="paper", buffer_size=32).buffer_size == 32
    assert made("spear", preset="paper").buffer_size == 2048
    assert replace(GRPO(preset="paper"), clip_high=0.3).kl_coefficient == 0.04


def test_positional_arguments_are_checked_as_ever():
    with pytest.raises(TypeError, match="multiple values"):
        GRPO(0.1, clip_low=0.2)
    with pytest.raises(TypeError, match="unexpected keyword"):
        GRPO(clip_lo=0.1)
    with pytest.raises(TypeError, match="positional"):
        EPO(*range(30))


def test_a_base_that_is_given_has_a_preset_of_its_own():
    assert GSPO(preset="paper").base == GRPO(preset="paper", kl_coefficient=0.0)
    assert made("gspo", preset="paper", base={"name": "gigpo"}).base == GiGPO()
    assert made("gspo", base={"name": "gigpo", "preset": "paper"}).base == GiGPO(preset="paper")


def test_what_is_no_preset_and_what_contradicts_parity_is_refused():
    for build in (lambda: GRPO(preset="papers"), lambda: build_recipe("grpo", {"preset": "papers"})):
        with pytest.raises(ConfigError, match=r"preset.*'papers', wanted .*paper"):
            build()
    with pytest.raises(ConfigError, match="parity=official implies the preset 'released'"):
        build_recipe("gigpo", {"preset": "paper", "parity": "official"})
    with pytest.raises(ConfigError, match=r"dual_clip is 10\.0, but parity=official sets it to 3\.0"):
        build_recipe("grpo", {"preset": "released", "parity": "official", "dual_clip": 10})
    assert made("grpo", preset="released", dual_clip=10).dual_clip == 10


def test_null_is_the_value_of_the_preset_where_it_always_was():
    nothing = dict.fromkeys(EPO.OPEN)
    for extra, wanted in (
        ({}, (2.0, "hinge", 20, 5, "constant")),
        ({"parity": "official"}, (0.1, "indicator", 0, 1, "official_epoch")),
        ({"preset": "released"}, (0.1, "indicator", 0, 1, "official_epoch")),
    ):
        for each in (EPO(**nothing, **extra), build_recipe("epo", nothing | extra)):
            assert tuple(getattr(each, name) for name in EPO.OPEN) == wanted
    assert EPO(parity="official", schedule="constant").schedule == "constant"
    assert AEPO(initial_rollouts=None).initial_rollouts == "measured"
    assert AEPO(initial_rollouts=None, parity="official").initial_rollouts == "half"


def test_what_a_run_wrote_down_under_parity_before_there_were_presets_is_read_as_it_was_meant():
    aepo = {"entropy_advantage": 0.2, "initial_rollouts": None, "parity": "official"}
    assert (made("aepo", **aepo).entropy_advantage, made("aepo", **aepo).initial_rollouts) == (0.0, "half")
    fr3e = made("fr3e", score="entropy", sharpen=False, alpha_root="one", parity="official")
    assert (fr3e.score, fr3e.sharpen, fr3e.alpha_root) == ("surprisal", True, "released")
    with pytest.raises(ConfigError, match=r"entropy_advantage is 0\.5, but parity=official sets it to 0\.0"):
        made("aepo", entropy_advantage=0.5, parity="official")


def test_it_is_told_which_given_values_stand_in_the_place_of_the_presets():
    recipe = made(
        "spear", preset="paper", warmup=9, base={"name": "dr_bot", "preset": "paper", "sequence_length": 64}
    )
    assert preset_overrides(recipe) == [
        "algorithm.base stays as given; preset=paper has {'name': 'dr_bot', 'preset': 'paper'}",
        "algorithm.base.sequence_length stays 64; preset=paper has 512",
        "algorithm.warmup stays 9; preset=paper has 200",
    ]
    assert preset_overrides(Spear(warmup=9)) == preset_overrides(Spear(parity="official")) == []


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_recipes", dict(registry._recipes))


@pytest.mark.usefixtures("own_registry")
def test_presets_are_inherited_and_merged():
    @recipe("third_party")
    @dataclass(frozen=True)
    class ThirdParty(GRPO):
        """A recipe of somebody else's."""

        PRESETS: ClassVar[Presets] = {"paper": {"strength": 2.0, "kl_coefficient": 0.5}}

        strength: float = 1.0

    paper = build_recipe("third_party", {"preset": "paper"})
    assert (paper.strength, paper.kl_coefficient, paper.drop_equal_groups) == (2.0, 0.5, False)
    released = ThirdParty(preset="released", strength=3.0)
    assert (released.strength, released.weighting, released.kl_coefficient) == (3.0, "row", 0.0)
    assert ThirdParty().strength == 1.0


def test_released_is_more_than_values_where_no_field_says_it():
    term = GRPO(kl_coefficient=0.1, preset="released").build().terms[0]
    assert term.loss.keywords["limit"] == 10
    assert AEPO(preset="released").build().transforms == ()
    branch_policy = AEPO(preset="released").build().rollout.branch_policy(7, 0, Context())
    assert branch_policy.begin() == [None] * 3
