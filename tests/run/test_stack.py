"""`algorithm.compose` stacks recipes in order; it is read, changed and refused as nested blocks are."""

import re
from pathlib import Path

import pytest
from shell import ROOT

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.methods.clip_cov import ClipCov
from agentrl.algorithms.methods.empg import EMPG
from agentrl.algorithms.methods.epo import EPO
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.stack import build_stack, stack_tree, stackable_names
from agentrl.config import read_yaml, to_yaml
from agentrl.errors import ConfigError
from agentrl.run.folder import Run, create_run, open_run
from agentrl.run.resumption import with_overrides
from agentrl.run.settings import RunConfig, config_tree, config_yaml, load_config
from agentrl.study.config import load_study
from agentrl.study.runs import plan

STACK = "[grpo, empg, clip_cov, {name: epo, entropy_coefficient: 0.002}]"
RECIPE = EPO(entropy_coefficient=0.002, base=ClipCov(base=EMPG(base=GRPO())))


@pytest.fixture
def stacked(tmp_path: Path) -> Path:
    file = tmp_path / "stacked.yaml"
    file.write_text(
        "algorithm:\n  compose:\n  - {name: grpo, kl_coefficient: 0.1}\n  - name: empg\n    k: 2.0\n"
        "  - clip_cov\n  - name: epo\n    low: 0.4\n"
    )
    return file


def named(recipe: object) -> list[str]:
    """The names of a stack, the innermost first."""
    return [*(named(recipe.base) if hasattr(recipe, "base") else []), recipe.name]


def test_parts_are_stacked_in_order_the_last_one_outermost(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(f"algorithm: {{compose: {STACK}}}")
    for config in (load_config(file), load_config(None, f"algorithm.compose={STACK}")):
        assert config.algorithm == RECIPE
    algorithm = RECIPE.build()
    assert [hook.__name__ for hook in algorithm.transforms] == ["modulate"]
    assert [hook.func.__name__ for hook in algorithm.weights] == ["covariance_clip"]
    assert [term.name for term in algorithm.terms] == ["epo_entropy", "epo_smoothing"]
    assert build_stack({"compose": ["gspo"]}) == build_recipe("gspo")
    # A first part keeps the base that it has by default.
    assert named(build_stack({"compose": ["spear", "epo"]})) == ["grpo", "dr_bot", "spear", "epo"]


def test_the_order_counts() -> None:
    # The outer one decides on the bounds.
    bounds = {
        order: build_stack({"compose": ["grpo", *order]}).build().clip.keywords["high"]
        for order in (("dapo", "gspo"), ("dr_bot", "dapo"), ("dapo", "dr_bot"))
    }
    assert bounds == {
        ("dapo", "gspo"): 4e-4,
        ("dr_bot", "dapo"): 0.28,
        ("dapo", "dr_bot"): build_recipe("dr_bot").clip_high,
    }


def test_what_is_printed_is_a_list_that_reads_back(stacked: Path, tmp_path: Path) -> None:
    config, again = load_config(stacked), tmp_path / "again.yaml"
    again.write_text(config_yaml(config))
    assert load_config(again) == config
    block = read_yaml(again)["algorithm"]
    assert list(block) == ["compose"]
    parts = block["compose"]
    assert [part["name"] for part in parts] == ["grpo", "empg", "clip_cov", "epo"]
    assert parts[1] == {"name": "empg", "preset": "ours", "k": 2.0, "k_future": 1.0, "zeta": 0.05}
    assert config_yaml(load_config(again)) == again.read_text()
    assert read_yaml(again) | {"algorithm": None} == config_tree(config) | {"algorithm": None}


def test_what_has_no_base_is_printed_by_its_name() -> None:
    assert stack_tree(GRPO()) == config_tree(RunConfig())["algorithm"]


@pytest.mark.filterwarnings("ignore:epo:UserWarning")
@pytest.mark.parametrize("preset", ["paper", "released", "ours"])
@pytest.mark.parametrize("name", stackable_names())
def test_every_recipe_with_a_base_is_printed_and_read_back(name: str, preset: str) -> None:
    recipe = build_recipe(name, {"preset": preset})
    assert build_stack(stack_tree(recipe)) == recipe


def test_blocks_inside_blocks_and_the_list_are_the_same(stacked: Path, tmp_path: Path) -> None:
    config, nested = load_config(stacked), tmp_path / "nested.yaml"
    nested.write_text(to_yaml(config_tree(config)))
    assert "compose" not in nested.read_text()
    assert load_config(nested) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("algorithm.compose.epo.low=0.3", (0.3, 2.0, 0.1)),
        ("algorithm.low=0.3", (0.3, 2.0, 0.1)),
        ("algorithm.compose.empg.k=3.0", (0.4, 3.0, 0.1)),
        ("algorithm.compose.1.k=3.0", (0.4, 3.0, 0.1)),
        ("algorithm.compose[1].k=3.0", (0.4, 3.0, 0.1)),
        ("algorithm.base.base.k=3.0", (0.4, 3.0, 0.1)),
        ("algorithm.base.base.base.kl_coefficient=0.2", (0.4, 2.0, 0.2)),
    ],
)
def test_an_override_reaches_a_part_by_its_name_or_as_in_blocks(
    stacked: Path, tmp_path: Path, override: str, value: tuple[float, ...]
) -> None:
    nested, extending = tmp_path / "nested.yaml", tmp_path / "extending.yaml"
    nested.write_text(to_yaml(config_tree(load_config(stacked))))
    extending.write_text("extends: stacked.yaml\nseed: 1\n")
    for file in (stacked, nested, extending):
        epo = load_config(file, override).algorithm
        assert (epo.low, epo.base.base.k, epo.base.base.base.kl_coefficient) == value
        assert named(epo) == ["grpo", "empg", "clip_cov", "epo"]


def test_a_file_that_extends_another_changes_its_parts(stacked: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "extends: stacked.yaml\nalgorithm:\n  compose: {empg: {k: 3.0}}\n  base: {share: 0.5}\n"
    )
    epo = load_config(tmp_path / "more.yaml").algorithm
    assert (epo.base.share, epo.base.base.k, epo.base.base.zeta) == (0.5, 3.0, 0.05)


def test_a_new_name_drops_the_stack_and_a_new_stack_drops_the_keys(stacked: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = load_config(
        stacked, "algorithm.name=dapo", "algorithm.clip_high=0.3", warn=said.append
    ).algorithm
    assert (named(recipe), recipe.clip_high) == (["grpo", "dapo"], 0.3)
    assert said == ["dropped algorithm.compose: it belongs to another name"]
    said.clear()
    file = tmp_path / "named.yaml"
    file.write_text("algorithm: {name: epo, low: 0.4, base: {name: gigpo}}")
    changes = ("algorithm.compose.empg.k=3.0", "algorithm.compose=[grpo, empg]")
    recipe = load_config(file, *changes, warn=said.append).algorithm
    assert (named(recipe), recipe.k) == (["grpo", "empg"], 3.0)
    assert said == [f"dropped algorithm.{key}: it belongs to another name" for key in ("low", "base")]
    said.clear()
    assert named(load_config(stacked, "algorithm.compose=[grpo, epo]", warn=said.append).algorithm) == [
        "grpo",
        "epo",
    ]
    assert said == []


def test_a_new_name_of_a_part_drops_its_keys_only(stacked: Path) -> None:
    said: list[str] = []
    recipe = load_config(stacked, "algorithm.base.base.name=gspo", warn=said.append).algorithm
    assert (named(recipe), recipe.low) == (["grpo", "gspo", "clip_cov", "epo"], 0.4)
    assert said == ["dropped algorithm.compose[1].k: it belongs to another name"]
    recipe = load_config(stacked, "algorithm.compose.empg=gspo", warn=said.append).algorithm
    assert named(recipe) == ["grpo", "gspo", "clip_cov", "epo"]
    with pytest.raises(ConfigError, match=r"^algorithm\.compose\[1\]: rloo cannot be put over another"):
        load_config(stacked, "algorithm.base.base.name=rloo")


STACKABLE = re.escape(", ".join(stackable_names()))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            "[grpo, rloo]",
            r"algorithm\.compose\[1\]: rloo cannot be put over another recipe because it has no base, wanted "
            rf"it first; these can be stacked: {STACKABLE} \[",
        ),
        (
            "[grpo, empg, {name: epo, base: {name: rloo}}]",
            r"algorithm\.compose\[2\]\.base: the base of a part is the part before it, wanted in the list",
        ),
        ("[{name: epo, base: {name: rloo}}]", r"algorithm\.compose\[0\]\.base: the base of a part is"),
        (
            "[grpo, epo, epo]",
            r"algorithm\.compose\[2\]: epo is compose\[1\] already, wanted each recipe at most once",
        ),
        ("[epo, grpo]", r"algorithm\.compose\[1\]: grpo cannot be put over another recipe"),
        (
            "[{name: spear, coefficient: 0.0}, dr_bot]",
            r"algorithm\.compose\[1\]: dr_bot is nested in itself, wanted each recipe at",
        ),
        (
            "[grpo, gspo, dapo]",
            r"algorithm\.compose\[2\]: clip cannot be combined with ratio: its bounds are those of single",
        ),
        ("[gigpo, aepo, empg]", r"algorithm\.compose\[2\]: transforms cannot be combined with transforms: "),
        ("[grpo, spear, clip_cov]", r"algorithm\.compose\[2\]: the base clips by covariance already"),
        ("[behaviour_cloning, gspo]", r"algorithm\.compose\[1\]: gspo: base 'behaviour_cloning' has no"),
        (
            "[grpo, {name: epo, lo: 1}]",
            r"algorithm\.compose\[1\]\.lo: unknown key \(got 1; did you mean low\?",
        ),
        ("[grpo, {name: epo, low: x}]", r"algorithm\.compose\[1\]\.low: wrong value \(got 'x', wanted a num"),
        ("[grpo, epoo]", r"algorithm\.compose\[1\]\.name: unknown recipe \(got 'epoo'; did you mean epo\?"),
        ("[grpo, {low: 1}]", r"algorithm\.compose\[1\]: got {'low': 1}, wanted the name of a recipe, or a"),
        ("[grpo, 5]", r"algorithm\.compose\[1\]: got 5, wanted the name of a recipe, or a block with a name"),
        ("[]", r"algorithm\.compose: got \[\], wanted a list of recipes, as in "),
        ("grpo", r"algorithm\.compose: got 'grpo', wanted a list of recipes"),
        ("{a: grpo, b: empg}", r"algorithm\.compose: got {'a': 'grpo', 'b': 'empg'}, wanted a list of rec"),
        ("null", r"algorithm\.compose: got None, wanted a list of recipes"),
    ],
)
def test_what_contradicts_is_refused_with_the_reason_and_its_place(
    parts: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"seed: 1\nalgorithm:\n  compose: {parts}\n")
    for arguments, origin in (
        ((file,), f"[{file}, line 3"),
        ((None, f"algorithm.compose={parts}"), "[override"),
    ):
        with pytest.raises(ConfigError, match=f"^{reason}") as caught:
            load_config(*arguments)
        assert origin in str(caught.value)


def test_every_misplaced_part_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("algorithm:\n  low: 0.4\n  compose:\n  - grpo\n  - rloo\n  - epo\n  - grpo\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "algorithm.low",
        "algorithm.compose[1]",
        "algorithm.compose[3]",
    ]
    assert lines[0].endswith(f"unknown key beside compose, wanted inside a part [{file}, line 2]")
    assert [line.rpartition(", ")[2] for line in lines[1:]] == ["line 5]", "line 7]"]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("algorithm.compose.rloo.k=1", "algorithm.compose.rloo.k: the configuration names no part rloo"),
        ("algorithm.compose.9.k=1", "algorithm.compose.9.k: the configuration names no part 9"),
        ("algorithm.base.base.k=x", r"algorithm.compose\[1\].k: wrong value \(got 'x'"),
        ("algorithm.compose.empg.k=-1", r"algorithm.compose\[1\].k: wrong value \(got -1"),
        ("algorithm.base.base.base.base.k=1", "algorithm.base: unknown key beside compose"),
    ],
)
def test_a_wrong_override_of_a_part_names_the_part_and_the_override(
    stacked: Path, override: str, mistake: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{mistake}") as caught:
        load_config(stacked, override)
    assert str(caught.value).endswith(f"[override {override}]")


def test_a_part_of_what_is_no_stack_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^algorithm\.compose\.epo\.low: the configuration names no part"):
        load_config(None, "algorithm.name=dapo", "algorithm.compose.epo.low=0.3")


def test_a_run_keeps_its_stack_and_is_resumed_with_no_other(stacked: Path, tmp_path: Path) -> None:
    run = create_run(load_config(stacked, f"run.folder={tmp_path}", "run.name=stacked"))
    assert open_run(run.folder) == run
    same = ("algorithm.compose.empg.k=2.0", "algorithm.base.base.k=2.0")
    assert with_overrides(run, same).config == run.config
    with pytest.raises(ConfigError, match=r"algorithm\.base\.base\.k: 2\.0 -> 3\.0$"):
        with_overrides(run, ("algorithm.compose.empg.k=3.0",))
    # Runs that were written as blocks inside blocks are read as before.
    (run.folder / "config.yaml").write_text(to_yaml(config_tree(run.config)))
    assert open_run(run.folder) == Run(run.folder, run.config)


def test_a_study_compares_stacks(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "base: quickstart.yaml\nbaseline: plain\nseeds: [0]\n"
        f"methods:\n  plain: {{}}\n  stack: {{algorithm: {{compose: {STACK}}}}}\n"
    )
    found = {run.name: run.config.algorithm for run in plan(load_study(file), tmp_path)}
    assert found["stack"] == RECIPE
    assert found["plain"] == GRPO()


def test_the_stack_of_the_documentation_is_what_it_says(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (snippet,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "compose" in block]
    file = tmp_path / "documented.yaml"
    file.write_text(snippet)
    recipe = load_config(file).algorithm
    assert named(recipe) == ["grpo", "empg", "clip_cov", "epo"]
    assert isinstance(recipe.build(), Algorithm)
    (override,) = re.findall(r"`(algorithm\.compose\.\w+\.\S+=\S+)`", text)
    assert load_config(file, override).algorithm.base.base.k == 0.5 != recipe.base.base.k
