"""A run under changed observations: what it logs, what `plan` says of it, and what is refused before it."""

import json
from pathlib import Path

import pytest

import agentrl
from agentrl.errors import ConfigError
from agentrl.planning.plan import plan

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (
    "rollout.placement=inline",
    "rollout.groups_per_step=3",
    "rollout.group_size=4",
    "evaluation.tasks=1",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "trainer.save_episodes_every=0",
    "trainer.steps=2",
    "warm_start.steps=30",
    "warm_start.demonstrations=60",
    "algorithm.name=vogue",
    "algorithm.base={name: grpo, drop_equal_groups: false}",
)
WITH_PARAPHRASE = "env.kwargs.paraphrase=true"


def config(folder: Path, perturbation: str, *more: str) -> agentrl.RunConfig:
    settings = (f"algorithm.perturbation={perturbation}", f"run.folder={folder}", "run.name=run")
    return agentrl.load_config("quickstart.yaml", *SMALL, *settings, *more)


@pytest.mark.parametrize("perturbation", ["items", "paraphrase"])
def test_a_run_tells_how_much_its_replies_depend_on_the_observation(
    perturbation: str, tmp_path: Path
) -> None:
    more = [WITH_PARAPHRASE] if perturbation == "paraphrase" else ["algorithm.amount=0.5"]
    run = agentrl.train(config(tmp_path, perturbation, *more), quiet=True)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if row["stage"] == "train"]
    assert [row["step"] for row in logged] == [1, 2]
    # All episodes in the first step, half of them in the second.
    shares = [row["train/algorithm/vogue/changed_share"] for row in logged]
    assert shares[0] > 0.4
    assert 0 < shares[1] < shares[0]
    assert all(row["train/algorithm/vogue/input_divergence"] > 0 for row in logged)


def test_an_environment_without_a_paraphrase_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    wanted = r"agentrl/ALFWorld-v0 gives no info\['paraphrase'\] with env.kwargs=.*; wanted an environment"
    with pytest.raises(ConfigError, match=wanted):
        agentrl.train(config(tmp_path, "paraphrase"), quiet=True)
    assert not (tmp_path / "run").exists()
    found = plan(config(tmp_path, "paraphrase"))
    assert any("gives no info['paraphrase']" in text for text in found.missing)


def test_the_plan_counts_the_further_pass(tmp_path: Path) -> None:
    lines = {line.what: line for line in plan(config(tmp_path, "noise", "algorithm.share=0.25")).lines}
    assert lines["scoring passes of a step"].amount == 2
    assert "of 25% of the episodes in the first step" in lines["scoring passes of a step"].how
    assert lines["token statistics"].amount
    plain = plan(config(tmp_path, "noise", "algorithm.input_weight=0.0"))
    assert not {"scoring passes of a step", "token statistics"} & {line.what for line in plain.lines}
