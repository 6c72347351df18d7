from pathlib import Path

import pytest

from agentrl.config import to_yaml
from agentrl.errors import ConfigError
from agentrl.run.folder import Run
from agentrl.run.resumption import with_overrides
from agentrl.run.settings import config_tree, load_config

NESTED = """
algorithm:
  name: epo
  low: 0.4
  base: {name: dapo, clip_high: 0.3, base: {name: gigpo, gamma: 0.9}}
"""


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    file = tmp_path / "nested.yaml"
    file.write_text(NESTED)
    return file


def test_a_new_name_of_a_base_takes_its_defaults_and_says_what_it_dropped(nested: Path) -> None:
    said: list[str] = []
    recipe = load_config(nested, "algorithm.base.base.name=rloo", warn=said.append).algorithm
    assert (recipe.low, recipe.base.clip_high, recipe.base.base.name) == (0.4, 0.3, "rloo")
    assert said == ["dropped algorithm.base.base.gamma: it belongs to another name"]


def test_the_same_name_again_drops_nothing(nested: Path) -> None:
    said: list[str] = []
    recipe = load_config(nested, "algorithm.base.base.name=gigpo", warn=said.append).algorithm
    assert (recipe.base.base.gamma, said) == (0.9, [])


def test_an_outer_name_drops_what_is_inside_whatever_the_order(nested: Path) -> None:
    said: list[str] = []
    overrides = ("algorithm.base.name=rloo", "algorithm.base.clip_high=0.25", "algorithm.name=empg")
    recipe = load_config(nested, *overrides, warn=said.append).algorithm
    assert (recipe.name, recipe.base.name, recipe.base.clip_high) == ("empg", "rloo", 0.25)
    assert [line.split(":")[0] for line in said] == ["dropped algorithm.low", "dropped algorithm.base"]


def test_a_preset_gives_way_to_what_the_file_says_and_that_is_told(tmp_path: Path) -> None:
    file, said = tmp_path / "spear.yaml", list[str]()
    file.write_text("algorithm: {name: spear, warmup: 9, base: {name: gigpo, gamma: 0.9}}")
    recipe = load_config(file, "algorithm.preset=paper", warn=said.append).algorithm
    assert (recipe.preset, recipe.warmup, recipe.buffer_size, recipe.base.preset) == (
        "paper",
        9,
        2048,
        "ours",
    )
    assert said == [
        "algorithm.base stays as given; preset=paper has {'name': 'dr_bot', 'preset': 'paper'}",
        "algorithm.warmup stays 9; preset=paper has 200",
    ]
    said.clear()
    recipe = load_config(file, "algorithm.base.preset=paper", warn=said.append).algorithm
    assert (recipe.base.sequence, recipe.base.gamma, recipe.warmup, said) == ("turn", 0.9, 9, [])
    recipe = load_config(None, "algorithm.name=spear", "algorithm.preset=paper", warn=said.append).algorithm
    assert (recipe.buffer_size, recipe.base.sequence_length, said) == (2048, 512, [])


def test_an_argument_of_the_environment_called_id_drops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("env: {id: my/Game-v0, kwargs: {id: 1, size: 2}}")
    assert load_config(file, "env.kwargs.id=3").env.kwargs == {"id": 3, "size": 2}


def test_what_is_printed_of_recipes_inside_recipes_is_read_back(nested: Path, tmp_path: Path) -> None:
    config = load_config(nested)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config_tree(config)))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("algorithm.name=5", r"algorithm\.name: got 5, wanted the name of a recipe"),
        ("algorithm.base=gigpo", r"algorithm\.base: got 'gigpo', wanted a block with the name of a recipe"),
        ("algorithm.base.name=gigp", r"algorithm\.base\.name: unknown recipe \(got 'gigp'; did you mean"),
        ("algorithm.base.base.gama=2", r"algorithm\.base\.base\.gama: unknown key"),
        (
            "algorithm.base.base.gamma=2",
            r"algorithm\.base\.base\.gamma: wrong value \(got 2, wanted at least 0 and",
        ),
        ("algorithm.base.base.gamma=x", r"algorithm\.base\.base\.gamma: wrong value \(got 'x'"),
        ("algorithm.base.base={name: epo}", r"algorithm: epo is nested in itself, wanted each recipe"),
    ],
)
def test_a_mistake_in_a_base_is_named_by_its_whole_path(nested: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}"):
        load_config(nested, override)


def test_every_mistake_of_a_base_has_its_path(nested: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(nested, "algorithm.base.base={name: gigpo, gama: 2, gamma: x}")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "algorithm.base.base.gama",
        "algorithm.base.base.gamma",
    ]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("algorithm.low=0.3", r"algorithm\.low: 0\.4 -> 0\.3$"),
        ("algorithm.base.base.gamma=0.8", r"algorithm\.base\.base\.gamma: 0\.9 -> 0\.8$"),
        ("algorithm.base.base.name=rloo", r"algorithm\.base\.base\.name: 'gigpo' -> 'rloo'\n"),
        ("algorithm.name=grpo", r"algorithm\.name: 'epo' -> 'grpo'\n"),
    ],
)
def test_a_run_is_not_resumed_with_another_algorithm(nested: Path, override: str, changed: str) -> None:
    run = Run(Path("runs/nested"), load_config(nested))
    with pytest.raises(ConfigError, match=f"cannot be resumed with other values; [^:]*:\n{changed}"):
        with_overrides(run, (override,))


def test_a_run_is_resumed_with_the_algorithm_that_it_has(nested: Path) -> None:
    run = Run(Path("runs/nested"), load_config(nested))
    same = ("algorithm.name=epo", "algorithm.base.base.gamma=0.9", "trainer.checkpoint_every=1")
    assert with_overrides(run, same).config.algorithm == run.config.algorithm


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.temperature=2.5",), r"rollout\.temperature is 2\.5, wanted within \[0\.01, 2\.0\]"),
        (("learner.backend=fsdp",), r"wanted engine\.actors, or engine\.vllm\.url"),
        (("warm_start.learner.backend=fsdp",), r"wanted engine\.actors, or engine\.vllm\.url"),
    ],
)
def test_what_vllm_cannot_do_beside_it_is_refused_when_it_is_read(
    overrides: tuple[str, ...], message: str
) -> None:
    load_config("quickstart.yaml", *overrides)
    load_config("quickstart.yaml", "learner.backend=fsdp", "engine.name=vllm", "engine.actors=1")
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart.yaml", "engine.name=vllm", *overrides)
