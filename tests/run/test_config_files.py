"""Configurations extend one another; a mistake names its file and line, or the override that made it."""

from pathlib import Path
from typing import Any

import pytest

from agentrl.config import key_lines, to_yaml
from agentrl.errors import ConfigError
from agentrl.run.config_files import read_config_files
from agentrl.run.folder import open_run
from agentrl.run.resumption import with_overrides
from agentrl.run.settings import RunConfig, config_tree, load_config
from agentrl.study.config import load_study


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def mistakes(*arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return str(caught.value).splitlines()


# Extending.


def test_a_file_changes_values_of_the_one_that_it_extends() -> None:
    write(
        "base.yaml", "seed: 3\ntrainer: {steps: 7, threads: 2}\nevaluation: {baselines: [random, expert]}\n"
    )
    write("mine.yaml", "extends: base.yaml\ntrainer: {steps: 9}\nevaluation: {baselines: [random]}\n")
    config = load_config("mine.yaml", "trainer.threads=4")
    assert (config.seed, config.trainer.steps, config.trainer.threads) == (3, 9, 4)
    assert config.evaluation.baselines == ("random",)


def test_the_resolved_tree_extends_nothing() -> None:
    write("base.yaml", "seed: 3\n")
    write("mine.yaml", "extends: base.yaml\n")
    tree = config_tree(load_config("mine.yaml"))
    assert "extends" not in tree
    assert load_config(write("again.yaml", to_yaml(tree))) == load_config("mine.yaml")


def test_a_chain_is_read_from_its_far_end_each_file_beside_the_one_that_names_it() -> None:
    write("lab/parts/far.yaml", "seed: 1\ntrainer: {steps: 1, threads: 1}\n")
    write("lab/near.yaml", "extends: parts/far.yaml\ntrainer: {steps: 2}\n")
    write("mine.yaml", "extends: lab/near.yaml\nseed: 5\n")
    files = read_config_files("mine.yaml")
    assert [str(file.path) for file in files] == ["lab/parts/far.yaml", "lab/near.yaml", "mine.yaml"]
    config = load_config("mine.yaml")
    assert (config.seed, config.trainer.steps, config.trainer.threads) == (5, 2, 1)


def test_a_shipped_file_is_extended_by_its_name() -> None:
    write("mine.yaml", "extends: math_tools.yaml\nseed: 8\n")
    shipped, mine = load_config("math_tools.yaml"), load_config("mine.yaml")
    assert (mine.env, mine.seed) == (shipped.env, 8)


def test_another_name_drops_the_keys_of_that_block_as_an_override_does() -> None:
    block = "algorithm: {name: epo, low: 0.4, base: {name: dapo, clip_high: 0.3}}\n"
    write("base.yaml", block + "env: {id: my/Game-v0, split: easy, kwargs: {size: 2}}\n")
    write("mine.yaml", "extends: base.yaml\nalgorithm: {name: empg}\nenv: {id: my/Other-v0}\n")
    said: list[str] = []
    config = load_config("mine.yaml", warn=said.append)
    assert (config.algorithm.name, config.algorithm.base.name) == ("empg", "grpo")
    assert (config.env.split, config.env.kwargs) == ("easy", {})
    by_override: list[str] = []
    overrides = ("algorithm.name=empg", "env.id=my/Other-v0")
    assert load_config("base.yaml", *overrides, warn=by_override.append) == config
    assert (
        said
        == by_override
        == [
            "dropped algorithm.low: it belongs to another name",
            "dropped algorithm.base: it belongs to another name",
            "dropped env.kwargs: it belongs to another id",
        ]
    )


def test_a_new_name_inside_a_recipe_drops_what_is_beside_it_alone() -> None:
    write("base.yaml", "algorithm: {name: epo, low: 0.4, base: {name: dapo, clip_high: 0.3}}\n")
    write("mine.yaml", "extends: base.yaml\nalgorithm: {base: {name: gigpo}}\n")
    said: list[str] = []
    recipe = load_config("mine.yaml", warn=said.append).algorithm
    assert (recipe.low, recipe.base.name) == (0.4, "gigpo")
    assert said == ["dropped algorithm.base.clip_high: it belongs to another name"]


def test_the_same_name_again_changes_its_keys() -> None:
    write("base.yaml", "algorithm: {name: epo, low: 0.4}\n")
    write("mine.yaml", "extends: base.yaml\nalgorithm: {name: epo, high: 3.0}\n")
    said: list[str] = []
    recipe = load_config("mine.yaml", warn=said.append).algorithm
    assert (recipe.low, recipe.high, said) == (0.4, 3.0, [])


def test_an_empty_block_is_a_value() -> None:
    write("base.yaml", "trainer: {steps: 7}\nenv: {kwargs: {max_steps: 5}}\n")
    write("mine.yaml", "extends: base.yaml\nenv: {kwargs: {}}\n")
    config = load_config("mine.yaml")
    assert (config.env.kwargs, config.trainer.steps) == ({}, 7)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a": "extends: a.yaml"}, "extends: a circle: a.yaml -> a.yaml"),
        (
            {"a": "extends: b.yaml", "b": "extends: c.yaml", "c": "extends: b.yaml"},
            "extends: a circle: a.yaml -> b.yaml -> c.yaml -> b.yaml",
        ),
        ({"a": "seed: 1\nextends: gone.yaml"}, "a.yaml, line 2: extends: gone.yaml: no such config file"),
        ({"a": "extends: [b.yaml]"}, "a.yaml, line 1: extends: got ['b.yaml'], wanted the name of one file"),
        ({"a": "extends:"}, "a.yaml, line 1: extends: got None, wanted the name of one file"),
        ({"a": "extends: b.yaml", "b": "seed: [\n"}, "b.yaml, line "),
    ],
)
def test_what_cannot_be_extended_is_refused(files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        write(f"{name}.yaml", text)
    (message,) = mistakes("a.yaml")
    assert message.startswith(reason)


# Whose mistake it is.


def test_a_mistake_names_its_file_and_line() -> None:
    write("mine.yaml", "seed: 1\nsede: 2\ntrainer:\n  steps: 3\n  stepz: 4\nlearner: {clip: yes}\n")
    origins = sorted(line.rpartition(" [")[2] for line in mistakes("mine.yaml"))
    assert origins == [f"mine.yaml, line {line}]" for line in (2, 5, 6)]
    assert "sede: unknown key (got 2; did you mean seed?) [mine.yaml, line 2]" in mistakes("mine.yaml")


def test_a_mistake_of_an_override_names_it() -> None:
    write("mine.yaml", "trainer:\n  steps: 3\n")
    assert mistakes("mine.yaml", "trainer.steps=x", "sede=2") == [
        "sede: unknown key (got 2; did you mean seed?) [override sede=2]",
        "trainer.steps: wrong value (got 'x', wanted an integer, at least 0 and at most 1000000000) "
        "[override trainer.steps=x]",
    ]
    assert mistakes("mine.yaml", "trainer={stepz: 1}") == [
        "trainer.stepz: unknown key (got 1; did you mean steps?) [override trainer={stepz: 1}]"
    ]


def test_a_mistake_of_what_is_extended_names_that_file() -> None:
    write("base.yaml", "\n\nsede: 2\n")
    write("mine.yaml", "extends: base.yaml\nseed: 1\n")
    assert mistakes("mine.yaml") == ["sede: unknown key (got 2; did you mean seed?) [base.yaml, line 3]"]
    write("mine.yaml", "extends: base.yaml\nsede: x\n")
    assert mistakes("mine.yaml") == ["sede: unknown key (got 'x'; did you mean seed?) [mine.yaml, line 2]"]


def test_values_that_contradict_each_other_name_both_origins() -> None:
    write("mine.yaml", "warm_start:\n  batch_size: 100\n")
    assert mistakes("mine.yaml", "warm_start.demonstrations=20") == [
        "warm_start.demonstrations is 20, wanted at least warm_start.batch_size (100) "
        "[override warm_start.demonstrations=20; mine.yaml, line 2]"
    ]


def test_a_value_that_a_default_contradicts_names_its_own_origin() -> None:
    write("mine.yaml", "warm_start:\n  batch_size: 5000\n")
    (line,) = mistakes("mine.yaml")
    assert line.startswith("warm_start.demonstrations is 1320")
    assert line.endswith(" [mine.yaml, line 2]")


def test_a_recipe_names_the_block_that_it_stands_in() -> None:
    write("mine.yaml", "seed: 1\nalgorithm:\n  name: epo\n  base:\n    name: gigp\n")
    (line,) = mistakes("mine.yaml")
    assert line.startswith("algorithm.base.name: unknown recipe (got 'gigp'")
    assert line.endswith(" [mine.yaml, line 5]")
    write("mine.yaml", "algorithm:\n  name: epo\n  base: {name: epo}\n")
    (line,) = mistakes("mine.yaml")
    assert line.startswith("algorithm: epo is nested in itself")
    assert line.endswith(" [mine.yaml, line 1]")


def test_without_file_and_override_there_is_nothing_to_name() -> None:
    assert load_config() == RunConfig()


def test_runs_and_studies_name_theirs(tmp_path: Path) -> None:
    write("runs/x/config.yaml", "seed: 1\ntrainer: {stepz: 2}\n")
    with pytest.raises(
        ConfigError, match=r"^trainer\.stepz: unknown key .* \[runs/x/config\.yaml, line 2\]\nrestore "
    ):
        open_run("x")
    write("runs/x/config.yaml", "seed: 1\n")
    with pytest.raises(
        ConfigError, match=r"^trainer\.threads: wrong value .* \[override trainer\.threads=x\]$"
    ):
        with_overrides(open_run("x"), ("trainer.threads=x",))
    write("study.yaml", "base: quickstart.yaml\nmethod: {}\n")
    with pytest.raises(ConfigError, match=r"method: unknown key .* \[study\.yaml, line 2\]"):
        load_study("study.yaml")


def test_the_lines_of_keys_survive_aliases_of_aliases() -> None:
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    laughs = "".join(f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in pairs)
    write("laughs.yaml", f"a: &a [x, x]\n{laughs}self: &self\n  again: *self\n")
    lines = key_lines("laughs.yaml")
    assert (lines["i",], lines["self",], lines["self", "again"]) == (9, 10, 11)
    assert len(lines) < 100
