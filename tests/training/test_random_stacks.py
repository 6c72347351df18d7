"""A random sample of pairs and triples of methods, through the real trainer."""

import random
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

import agentrl
from agentrl.algorithms.recipe import recipe_names
from agentrl.algorithms.stack import build_stack, stackable_names
from agentrl.errors import ConfigError, RequirementError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]


def accepted(names: tuple[str, ...]) -> bool:
    try:
        build_stack({"compose": list(names)})
    except ConfigError:
        return False
    return True


def drawn(size: int, count: int) -> list[tuple[str, ...]]:
    """Stacks of this many methods that build, the same in every run."""
    draw, found = random.Random(size), []
    while len(found) < count:
        outer = draw.sample(stackable_names(), size - 1)
        names = (draw.choice(recipe_names()), *outer)
        if len(set(names)) == size and accepted(names) and names not in found:
            found.append(names)
    return found


@pytest.mark.parametrize("names", [*drawn(2, 12), *drawn(3, 12)], ids="-".join)
def test_a_stack_trains_or_is_refused_before_the_first_rollout(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (
        f"algorithm={{compose: [{', '.join(names)}]}}",
        "warm_start.steps=2",
        "warm_start.demonstrations=24",
        "trainer.steps=2",
        "rollout.groups_per_step=2",
        "rollout.group_size=4",
        "rollout.placement=inline",
        "evaluation.tasks=1",
        "evaluation.baselines=[]",
        "evaluation.instruction_check=false",
        "trainer.save_episodes_every=0",
        f"run.folder={tmp_path}",
        "run.name=run",
    )
    config = agentrl.load_config("quickstart.yaml", *settings)
    run = None
    with suppress(RequirementError):
        run = agentrl.train(config, quiet=True)
    if run is None:
        assert not list((tmp_path / "run").glob("metrics.jsonl"))
        return
    assert run.summary
    weights = load_file(run.model / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())
