"""Ranks in Ray actors do what torchrun's processes do; none is left after a failure or an interrupt."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import agentrl
from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.ranks import process_group
from agentrl.learn.settings import LearnerConfig

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from agentrl.scale.ray_ranks import RankHost, run_on_ray

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.kwargs.max_steps=5",
    "evaluation.tasks=4",
    "evaluation.baselines=[]",
    "warm_start.steps=0",
    "learner.backend=fsdp",
    "learner.optimizer=adamw",
    "trainer.checkpoint_every=1",
    "policy.tokenizer_episodes=4",
    "policy.hidden_size=32",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.placement=inline",
    "algorithm.name=ppo",
    "algorithm.entropy_coefficient=0.1",  # so that there is a gradient where no episode succeeds
)


def summed() -> tuple[int, float]:
    with process_group(torch.device("cpu")) as ranks:
        print("rank", ranks.index, os.environ["LOCAL_RANK"])
        return ranks.count, float(ranks.all_reduce(torch.tensor([ranks.index + 1.0])))


def failing(deed: str) -> None:
    with process_group(torch.device("cpu")) as ranks:
        if ranks.index == 1:
            if deed == "die":
                os._exit(3)
            raise {"refuse": ConfigError("it is wrong"), "break": ValueError("no such shelf")}[deed]
        ranks.all_reduce(torch.ones(1))


@pytest.mark.slow
def test_ranks_join_and_the_first_is_heard(ray_is_there: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_on_ray(summed, 2) == (2, 3.0)
    assert capsys.readouterr().out == "rank 0 0\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("die", "rank 1 on .* was lost: .*; the run's folder keeps its last checkpoint: agentrl train --res"),
        ("refuse", "^it is wrong$"),
        ("break", "no such shelf|Connection"),  # whichever error comes first
    ],
)
def test_one_that_fails_ends_all(ray_is_there: None, deed: str, message: str) -> None:
    with pytest.raises(AgentRLError, match=message):
        run_on_ray(partial(failing, deed), 2)


@pytest.mark.slow
def test_more_gpus_than_there_are_are_refused(ray_is_there: None) -> None:
    with pytest.raises(ConfigError, match=r"^learner.processes is 999, each with 1 GPUs, wanted at most"):
        run_on_ray(summed, 999, gpus=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"launcher": "ray", "backend": "fsdp"}, "processes is None, wanted at least 1 with launcher: ray"),
        ({"processes": 2, "backend": "fsdp"}, "processes is 2, wanted .* null with torchrun"),
        ({"launcher": "ray", "processes": 2}, "launcher is ray, wanted torchrun, or backend: fsdp"),
    ],
)
def test_who_starts_how_many_is_said_together(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LearnerConfig(**wrong)


def config(folder: Path, *more: str) -> Any:
    return agentrl.load_config(None, *TINY, f"run.folder={folder}", "run.name=tiny", *more)


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(ray_is_there: None, tmp_path: Path) -> None:
    alone = agentrl.train(config(tmp_path / "alone", "learner.backend=single", "trainer.steps=2"), quiet=True)
    work = partial(agentrl.train, config(tmp_path / "together", "trainer.steps=2"))
    together = run_on_ray(work, 2)
    one, other = (load_file(run.model / "model.safetensors") for run in (alone, together))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
    rows = [json.loads(line) for line in (together.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/learner/grad_norm"] > 1e-3 for row in rows)


def test_a_rank_imports_what_its_driver_has_before_it_is_given_work(tmp_path: Path) -> None:
    host = RankHost([], os.getcwd(), [str(tmp_path / "gone.py")])
    result, error = host.run({}, b"never opened", None)
    assert result is None
    assert str(error) == f"import {tmp_path / 'gone.py'}: no such file"
