"""Every method through the real trainer, on the quickstart's game and from one cloned start."""

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import agentrl
from agentrl.run.logger import RunLogger
from agentrl.run.metric_keys import find_metric

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (
    "rollout.placement=inline",
    "evaluation.tasks=1",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "trainer.checkpoint_every=1",
    "trainer.save_episodes_every=0",
    "rollout.groups_per_step=4",
    "learner.mini_batches=2",
)

Row = Mapping[str, Any]


def moved(name: str) -> Callable[[Row], bool]:
    """Whether a metric, `room/name`, was logged and is not 0."""
    return lambda row: bool(row.get(f"train/{name}"))


# name -> settings, and what must have been seen in some step for the method to have been at work
METHODS: dict[str, tuple[tuple[str, ...], tuple[Callable[[Row], bool], ...]]] = {
    "grpo": (("algorithm.kl_coefficient=0.01",), (moved("learner/term/kl"), moved("learner/kl"))),
    "dr_grpo": ((), (moved("learner/policy_loss"),)),
    "rloo": ((), (moved("learner/policy_loss"),)),
    "reinforce_pp": ((), (moved("learner/policy_loss"),)),
    "ppo": ((), (moved("learner/term/value"), moved("algorithm/value_mean"))),
    "aem": ((), (moved("algorithm/aem/scale_min"),)),
    "cispo": (("algorithm.clip_high=0.0",), (moved("learner/clip_ratio"),)),
    "dapo": (("algorithm.max_rounds=2",), (lambda row: row["train/rollout/rounds"] == 2,)),
    "dppo": (("algorithm.delta=0.000001",), (moved("learner/clip_ratio"),)),
    "gigpo": ((), (moved("algorithm/advantage_step"), moved("algorithm/states_shared"))),
    "graphgpo": ((), (moved("algorithm/advantage_step"), moved("algorithm/states_shared"))),
    "hgpo": ((), (moved("algorithm/hgpo/shared/0"), moved("algorithm/hgpo/shared/2"))),
    "mis": (
        ("algorithm.low=1.0", "algorithm.by=each"),
        (moved("algorithm/mismatch/rejected"),),
    ),
    "ragen": (("algorithm.share=0.5",), (lambda row: row["train/rollout/groups_kept"] < 1,)),
    "sampo": (("algorithm.cold_start=0", "algorithm.max_rounds=1"), (moved("algorithm/advantage_step"),)),
    "tis": (("algorithm.cap=0.9",), (moved("algorithm/mismatch/capped"),)),
    "gspo": ((), (moved("learner/clip_ratio"),)),
    "maxrl": ((), (moved("learner/policy_loss"),)),
    "sapo": ((), (moved("learner/policy_loss"),)),
    "epo": (
        ("algorithm.min_history=1", "algorithm.low=0.99", "algorithm.high=1.01"),
        (
            moved("learner/term/epo_entropy"),
            moved("learner/term/epo_smoothing"),
            moved("algorithm/entropy_band/share_above"),
        ),
    ),
    "empg": ((), (moved("algorithm/empg/bonus_share"),)),
    "aepo": ((), (moved("rollout/branches/restored"), moved("algorithm/entropy_score_max"))),
    "spear": (
        ("algorithm.buffer_size=1", "algorithm.warmup=0", "algorithm.tolerate_steps=9"),
        (moved("algorithm/replay/size"), moved("algorithm/replay/loss")),
    ),
    "forking": ((), (lambda row: 0 < row["train/learner/mask_share"] < 0.6,)),
    "lp_reg": (("algorithm.share=0.5",), (moved("learner/term/lp_reg"),)),
    "siren": (
        ("algorithm.quantile=0.5", "algorithm.top_p=0.99"),
        (moved("learner/term/siren"), moved("algorithm/siren/peak_entropy")),
    ),
    "hapo": (
        ("algorithm.temperature_change=0.05",),
        (moved("algorithm/hapo/pivot"), lambda row: row["train/learner/weight_mean"] != 1.0),
    ),
    "lare": (("algorithm.warmup=1",), (moved("algorithm/lare/loss"), moved("algorithm/lare/reward_max"))),
    "prime": (
        ("algorithm.max_rounds=2",),
        (moved("learner/reward_model/loss"), moved("algorithm/reward_model/margin")),
    ),
    "hicra": (('algorithm.grams=["go", "take"]',), (moved("algorithm/hicra/planning_share"),)),
    "empo": (("algorithm.answers=state",), (moved("algorithm/empo/agreement"),)),
    "one_shot": ((), (moved("learner/term/one_shot_entropy"),)),
    "pear": ((), (moved("learner/policy_loss"),)),
    "seed_grpo": (("algorithm.answers=state",), (moved("algorithm/seed_grpo/semantic_entropy"),)),
    "light_if": ((), (moved("learner/term/tea_entropy"),)),
    "t1": ((), (moved("learner/term/t1_entropy"),)),
    "distill": (("learner.teacher={clone}",), (moved("algorithm/distill/kl"),)),
    "drpo": ((), (moved("learner/term/drpo"),)),
    "copo": (("algorithm.answers=state",), (moved("algorithm/copo/local_share"),)),
    "e3b": (
        ("algorithm.coefficient=0.1",),
        (moved("algorithm/e3b/bonus"), moved("algorithm/e3b/rnd_error"), moved("algorithm/e3b/states")),
    ),
    "vogue": (
        ("algorithm.output_weight=0.0", "algorithm.amount=1.0"),
        (
            moved("algorithm/vogue/input_divergence"),
            lambda row: row.get("train/algorithm/vogue/changed_share", 0) > 0.5,
        ),
    ),
    "ares": (("algorithm.window=1",), (moved("algorithm/ares/threshold"),)),
    "appo": (
        ("learner.epochs=2",),
        (
            moved("rollout/branches/restored"),
            moved("algorithm/appo/credit"),
            lambda row: row["train/learner/weight_mean"] > 1,
        ),
    ),
    "t2po": (
        ("algorithm.change=0.2",),
        (moved("algorithm/t2po/resampled"), moved("algorithm/t2po/discarded_tokens")),
    ),
    "hiper": (  # its replies are plain here: each is an action as a whole
        (),
        (moved("learner/term/value"), moved("algorithm/hiper/segment_turns")),
    ),
    "arbitrary_entropy": (
        (),
        (moved("algorithm/arbitrary_entropy/entropy"), moved("algorithm/arbitrary_entropy/replaced")),
    ),
    "dcpo": ((), (moved("algorithm/dcpo/strength"), moved("algorithm/dcpo/entropy"))),
    "cure": (
        ("algorithm.rollouts=2",),
        (
            moved("rollout/branches/restored"),
            lambda row: 0 < row.get("train/algorithm/trees/own_tokens", 1) < 1,
        ),
    ),
    "ettrl": (
        (),
        (
            moved("rollout/branches/restored"),
            lambda row: 0 < row.get("train/algorithm/trees/own_tokens", 1) < 1,
        ),
    ),
    "fr3e": (
        ("algorithm.continuations=2",),
        (moved("rollout/branches/restored"), moved("algorithm/states_kept")),
    ),
}


# They differ in the advantage alone, which other tests see: here they are minutes that prove little.
ESTIMATORS = ("dr_grpo", "rloo", "reinforce_pp", "gigpo", "gspo", "maxrl", "graphgpo", "hgpo")

QUICK = ("spear", "epo", "prime")  # remember what no other of them does


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a short behaviour cloning."""
    folder = tmp_path_factory.mktemp("clone")
    started = agentrl.load_config(
        "quickstart.yaml",
        *SMALL,
        "trainer.steps=0",
        "warm_start.steps=90",
        "warm_start.demonstrations=360",
        f"run.folder={folder}",
        "run.name=clone",
    )
    return agentrl.train(started, quiet=True).model


def config(clone: Path, folder: Path, name: str, *more: str, steps: int = 2) -> agentrl.RunConfig:
    return agentrl.load_config(
        "quickstart.yaml",
        *SMALL,
        f"policy.path={clone}",
        "policy.preset=scratch",
        "warm_start.steps=0",
        f"trainer.steps={steps}",
        f"algorithm.name={name}",
        *(setting.format(clone=clone) if "{clone}" in setting else setting for setting in METHODS[name][0]),
        f"run.folder={folder}",
        "run.name=run",
        *more,
    )


def rows(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ESTIMATORS else []) for name in METHODS],
)
def test_a_method_learns_by_its_own_signal_and_every_weight_stays_finite(
    name: str, clone: Path, tmp_path: Path
) -> None:
    run = agentrl.train(config(clone, tmp_path, name), quiet=True)
    logged = rows(run.folder)
    assert [row["step"] for row in logged] == [1, 2]
    assert all(find_metric(key) for row in logged for key in row.keys() - {"stage", "step"})
    for sign in METHODS[name][1]:
        assert any(sign(row) for row in logged), logged
    assert sum(row.get("train/learner/updates", 0) for row in logged) >= 1
    assert sum(row.get("train/learner/skipped_updates", 0) for row in logged) == 0
    assert all(math.isfinite(value) for row in logged for key, value in row.items() if key != "stage")
    before = load_file(clone / "model.safetensors")
    after = load_file(run.model / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(not bool((after[key] == before[key]).all()) for key in before)
    for row in logged:
        for level in ("token", "turn", "trajectory"):
            assert row[f"train/rollout/entropy/{level}"] > 0
    budget = {"fr3e": 1 + 3 * 2, "ettrl": 2 * (1 + 2 * 2), "cure": 2 + 2 * 3}.get(name, 8)
    assert all(row["train/rollout/episodes"] == row["train/rollout/rounds"] * 4 * budget for row in logged)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("spear", 2),
        ("epo", 1),
        ("prime", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in METHODS if name not in QUICK),
    ],
)
def test_a_run_that_stopped_in_the_middle_of_what_a_method_remembers_goes_on_bit_for_bit(
    name: str, step: int, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPEAR's buffer is filled in step 1, EPO's band is that of the steps before, PRIME trains a model."""
    whole = agentrl.train(config(clone, tmp_path / "whole", name, steps=step + 1), quiet=True)
    write = RunLogger.write

    def interrupting(self: RunLogger, row: dict[str, Any], **kwargs: Any) -> None:
        write(self, row, **kwargs)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            agentrl.train(config(clone, tmp_path / "parts", name, steps=step + 1), quiet=True)
    assert len(rows(tmp_path / "parts" / "run")) == step
    named = [f"learner.teacher={clone}"] if name == "distill" else []
    resumed = agentrl.resume(tmp_path / "parts" / "run", *named, quiet=True)
    assert rows(resumed.folder) == rows(whole.folder)
    one, other = (run.model / "model.safetensors" for run in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()
    if name == "spear":
        recalled = [row["step"] for row in rows(whole.folder) if row.get("train/algorithm/replay/recalled")]
        assert recalled
        assert max(recalled) > step
