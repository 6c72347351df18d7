"""A run is resumed with more steps, where no schedule changes by it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from test_damaged_runs import TINY
from test_trainer import rows

import agentrl
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError
from agentrl.run.folder import open_run
from agentrl.run.resumption import with_overrides

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (*TINY, "evaluation.baselines=[]", "evaluation.instruction_check=false", "trainer.steps=2")
CONSTANT = ("learner.schedule=constant", "learner.warmup_steps=3")


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *SMALL, f"run.folder={folder}", "run.name=tiny", *more)


def trained(folder: Path, *more: str) -> agentrl.Run:
    return agentrl.train(config(folder, *more), quiet=True)


@pytest.fixture(scope="module")
def short(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    return trained(tmp_path_factory.mktemp("short"), *CONSTANT)


def same_end(one: agentrl.Run, other: agentrl.Run) -> None:
    weights = [(run.model / "model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    assert rows(one.folder) == rows(other.folder)
    assert one.summary["policies"]["trained"] == other.summary["policies"]["trained"]


def test_a_finished_run_with_more_steps_equals_one_that_had_them_from_the_start(
    short: agentrl.Run, tmp_path: Path
) -> None:
    raised = tmp_path / "tiny"
    shutil.copytree(short.folder, raised)
    longer = agentrl.resume(raised, "trainer.steps=4", quiet=True)
    same_end(longer, trained(tmp_path / "whole", *CONSTANT, "trainer.steps=4"))
    assert open_run(raised).config.trainer.steps == 4
    scores = json.loads((raised / "evaluations.json").read_text())
    assert scores["step-000002"] == short.summary["policies"]["trained"]
    assert json.loads((raised / "summary-step-000002.json").read_text()) == short.summary
    assert {path.name for path in (raised / "episodes").glob("*-greedy.parquet")} == {
        "step-000002-greedy.parquet",
        "trained-greedy.parquet",
    }
    with pytest.raises(ConfigError, match=r"trainer\.steps: 4 -> 2: .* can be raised, not lowered"):
        agentrl.resume(raised, "trainer.steps=2", quiet=True)


def test_a_schedule_that_was_given_its_steps_goes_on(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    given = ("learner.schedule=cosine", "trainer.schedule_steps=3")
    run = trained(tmp_path, *given)
    same_end(
        agentrl.resume(run.folder, "trainer.steps=4", quiet=True),
        trained(tmp_path / "whole", *given, "trainer.steps=4"),
    )


@pytest.mark.parametrize(
    ("keys", "reader"),
    [
        (("learner.schedule=cosine",), r"learner\.schedule=cosine"),
        ((*CONSTANT, "algorithm={name: epo, schedule: ramp}"), r"algorithm\.name=epo"),
    ],
)
def test_more_steps_that_would_change_a_schedule_are_refused_with_what_to_do(
    keys: tuple[str, ...], reader: str, tmp_path: Path
) -> None:
    run = agentrl.Run(tmp_path, config(tmp_path, *keys))
    with pytest.raises(
        ConfigError, match=rf"2 -> 4 would .* of {reader}, .*Add trainer\.schedule_steps=2 to"
    ):
        with_overrides(run, ("trainer.steps=4",))
    kept = with_overrides(run, ("trainer.steps=4", "trainer.schedule_steps=2"))
    assert kept.config.trainer == replace(run.config.trainer, steps=4, schedule_steps=2)
    with pytest.raises(
        ConfigError, match=r"cannot be resumed with other values(?s:.*)learner\.learning_rate"
    ):
        with_overrides(run, ("trainer.steps=4", "trainer.schedule_steps=2", "learner.learning_rate=1"))
    with pytest.raises(ConfigError, match=r"trainer\.schedule_steps: None -> 5"):
        with_overrides(run, ("trainer.schedule_steps=5",))


@pytest.mark.parametrize(
    ("recipe", "scheduled"),
    [
        ({"name": "epo"}, False),
        ({"name": "epo", "schedule": "exponential"}, True),
        ({"name": "epo", "preset": "released"}, False),  # its schedule is over 150 epochs, whatever the run
        ({"name": "empg", "base": {"name": "epo", "schedule": "ramp"}}, True),
        ({"name": "grpo"}, False),
    ],
)
def test_an_algorithm_says_whether_its_schedule_depends_on_the_number_of_steps(
    recipe: dict[str, object], scheduled: bool
) -> None:
    name = str(recipe.pop("name"))
    assert build_recipe(name, recipe).build().scheduled is scheduled
