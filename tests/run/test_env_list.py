"""`env` as a list: what it says, how keys name its environments, and which mistakes are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from locked_door import ENV as DOOR

from agentrl.config import to_yaml
from agentrl.errors import ConfigError
from agentrl.run.folder import Run
from agentrl.run.mixture import MixedEnvConfig
from agentrl.run.resumption import with_overrides
from agentrl.run.settings import RunConfig, config_from_tree, config_tree, config_yaml, load_config
from agentrl.run.trust import caller_only_values, check_confirmed, drop_caller_only_values

TWO = "env=[{id: a/Games-v0, weight: 2, kwargs: {size: 3}}, {id: a/Sums-v1, name: sums, split: easy}]"


def listed(*overrides: str) -> tuple[MixedEnvConfig, ...]:
    env = load_config(None, TWO, *overrides).env
    assert isinstance(env, tuple)
    return env


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, *overrides)
    return str(caught.value)


def test_each_environment_has_its_own_values_and_a_name() -> None:
    games, sums = listed()
    assert games == MixedEnvConfig("a/Games-v0", kwargs={"size": 3}, name="Games", weight=2.0)
    assert (sums.name, sums.split, sums.kwargs, sums.weight) == ("sums", "easy", {}, 1.0)


def test_a_written_mixture_is_read_back(tmp_path: Path) -> None:
    config = load_config(None, TWO)
    (tmp_path / "mixed.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "mixed.yaml") == config == config_from_tree(config_tree(config))


@pytest.mark.parametrize("name", ["0", "Games"])
def test_a_key_names_an_environment_by_its_name_or_its_place(name: str) -> None:
    changed, other = listed(f"env.{name}.kwargs.size=5", f"env.{name}.weight=7")
    assert (changed.kwargs, changed.weight) == ({"size": 5}, 7.0)
    assert other == listed()[1]
    assert listed("env[0].weight=7")[0].weight == 7.0


def test_a_new_id_empties_the_arguments_of_that_environment_alone() -> None:
    dropped: list[str] = []
    config = load_config(None, TWO, "env.0.id=a/Other-v0", warn=dropped.append)
    assert [env.kwargs for env in config.environments] == [{}, {}]
    assert config.environments[0].id == "a/Other-v0"
    assert dropped == ["dropped env.0.kwargs: it belongs to another id"]


def test_a_list_and_a_block_replace_each_other(tmp_path: Path) -> None:
    single = load_config(None, TWO, "env={id: a/Sums-v1}", "env.kwargs.level=2")
    assert (single.env, single.names) == (
        replace(RunConfig().only_env, id="a/Sums-v1", kwargs={"level": 2}),
        (),
    )
    tree = {"extends": "quickstart.yaml", "env": [{"id": "a/Games-v0"}]}
    (tmp_path / "mixed.yaml").write_text(to_yaml(tree))
    assert load_config(tmp_path / "mixed.yaml", "env.Games.weight=3").names == ("Games",)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["env=[]"], "env: wrong value (got [], wanted a block, or a list of at least one)"),
        (["env=3"], "env: wrong value (got 3, wanted a block of keys or a list)"),
        (["env=[{weight: 2}]"], "env[0]: id is missing"),
        (["env=[{id: a/A-v0}, 4]"], "env[1]: wrong value (got 4, wanted a block of keys)"),
        (["env=[{id: a/A-v0}, {id: b/A-v1}]"], "env[1].name: A is the name of another environment"),
        (["env=[{id: a/A-v0, weight: 0}]"], "env[0].weight: wrong value (got 0, wanted above 0"),
        (["env=[{id: a/A-v0, wieght: 1}]"], "env[0].wieght: unknown key (got 1; did you mean weight?)"),
        (["env=[{id: a/A-v0, name: 1st}]"], "env[0]: name is '1st', wanted a letter, then letters, digits"),
        ([TWO, "env.id=a/A-v0"], "env.id: env is a list of environments, wanted one of 0 (Games), 1 (sums)"),
        ([TWO, "env.2.weight=1"], "env.2.weight: env is a list of environments, wanted one of 0 (Games)"),
        ([TWO, "evaluation.panel=p.json"], "evaluation.panel is 'p.json', but env is a list"),
    ],
)
def test_a_mistake_is_refused_with_its_place(overrides: list[str], told: str) -> None:
    assert told in refused(*overrides)


def test_a_mistake_is_traced_to_its_line(tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text("env:\n  - id: a/A-v0\n  - id: a/B-v0\n    weight: -1\n")
    with pytest.raises(ConfigError, match=r"env\[1\]\.weight: .*mixed\.yaml, line 4\]"):
        load_config(tmp_path / "mixed.yaml")


def test_each_environment_is_a_configuration_of_its_own_with_its_placement() -> None:
    config = load_config(None, TWO, "env.sums.placement=thread", "env.sums.environments_per_worker=1")
    games, sums = config.each_alone()
    assert (games.only_env.id, sums.only_env.id) == ("a/Games-v0", "a/Sums-v1")
    assert (games.rollout, sums.rollout.placement) == (config.rollout, "thread")
    assert sums.rollout.workers.environments == 1
    assert config.alone("sums") == config.alone("a/Sums-v1") == sums
    assert config.environment_of("sums/train/3") == sums.only_env
    (alone,) = RunConfig().each_alone()
    assert alone == RunConfig()


def test_a_resumed_run_may_move_its_environments_and_change_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path, load_config(None, TWO))
    moved = with_overrides(run, ("env.sums.placement=process", "env.0.environments_per_worker=2"))
    assert [env.placement for env in moved.config.env] == [None, "process"]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"env\.0\.weight: 2\.0 -> 3\.0"):
        with_overrides(run, ("env.Games.weight=3",))


def test_arguments_of_the_caller_are_not_taken_from_a_runs_folder() -> None:
    doors = f"env=[{{id: {DOOR}, kwargs: {{lock: open, hue: blue}}}}, {{id: a/Sums-v1}}]"
    config = load_config(None, doors)
    assert caller_only_values(config) == {"env.Door.kwargs.lock": "open"}
    kept: Any = drop_caller_only_values(config).env
    assert [env.kwargs for env in kept] == [{"hue": "blue"}, {}]
    with pytest.raises(ConfigError, match=r"""repeat them:\n.* 'env\.Door\.kwargs\.lock="open"'"""):
        check_confirmed("runs/mine", config, ["env.1.weight=1"])
    for said in ("env.Door.kwargs.lock=open", "env.0.kwargs.lock=open", "env.0.kwargs={lock: open}"):
        check_confirmed("runs/mine", config, [said])
