"""The files for clusters: every key of the example is explained, and the Slurm job does what it says."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import agentrl

ROOT = Path(__file__).resolve().parents[1]


def test_every_key_of_the_cluster_config_is_explained() -> None:
    lines = (ROOT / "configs" / "cluster.yaml").read_text().splitlines()
    keys = [line for line in lines if re.match(r" +\w+: \S", line)]
    assert keys
    assert [line for line in keys if "  # " not in line] == []


def test_the_cluster_config_loads_and_uses_every_seam() -> None:
    config = agentrl.load_config(ROOT / "configs" / "cluster.yaml")
    assert (config.rollout.backend, config.engine.name, config.engine.actors) == ("ray", "vllm", 1)
    assert (config.learner.backend, config.learner.launcher, config.trainer.mode) == ("fsdp", "ray", "async")
    assert config.rollout.groups_per_step % (config.learner.processes or 1) == 0
    # Every episode in flight has a place in the actors of its process.
    workers = config.rollout.workers
    places = (config.rollout.ray.actors or 0) * (workers.count or 0) * (workers.environments or 0)
    assert config.rollout.max_active == places


SMALL = (
    "env.id=agentrl/MathTools-v0",
    "policy.path=null",
    "policy.device=cpu",
    "policy.reply=plain",
    "policy.max_context=256",
    "policy.tokenizer_episodes=4",
    "engine.name=torch",
    "engine.max_tokens=8",
    "engine.actor_gpus=0",
    "engine.actor_cpus=0",
    "rollout.ray.address=null",
    "rollout.ray.actors=1",
    "rollout.workers.count=1",
    "rollout.workers.environments=4",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "rollout.max_active=4",
    "learner.processes=2",
    "trainer.steps=2",
    "trainer.checkpoint_every=1",
    "trainer.threads=1",
    "evaluation.tasks=2",
    "evaluation.every=0",
)


@pytest.mark.slow
def test_the_cluster_config_trains_when_cut_down_to_one_machine(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    command = [sys.executable, ROOT / "scripts" / "train.py", ROOT / "configs" / "cluster.yaml"]
    subprocess.run(
        [*command, *SMALL, f"run.folder={tmp_path}", "run.name=small"], check=True, cwd=tmp_path, timeout=280
    )
    run = agentrl.open_run(tmp_path / "small")
    assert len(list((run.folder / "metrics.jsonl").read_text().splitlines())) == 2
    assert set(json.loads((run.folder / "evaluations.json").read_text())) == {"untrained", "trained"}


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "scontrol $*" >>"$LOG"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "ray": 'echo "ray $*" >>"$LOG"',
    "python": (
        'if [ "$1" = -c ]; then\n'
        '  if [ -e "$LOG.lost" ]; then echo 1; else grep -c "^ray" "$LOG"; fi; exit 0\n'
        "fi\n"
        'echo "python $* at $RAY_ADDRESS" >>"$LOG"\n'
        'if [ -n "${WAITS:-}" ]; then\n'
        '  trap \'echo saved >>"$LOG"; exit 130\' TERM; touch "$WAITS"\n'
        "  for _ in {1..300}; do sleep 0.1; done\n"
        "fi\n"
        'if [ -n "${LOSES:-}" ]; then touch "$LOG.lost"; fi\n'
        'exit "${CODE:-0}"'
    ),
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm, Ray and Python only note how they were called."""
    for name, body in STUBS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "RUNS": str(tmp_path / "runs"),
        "RAY_WAIT": "0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "first,second",
    }


SBATCH = ["bash", str(ROOT / "configs" / "slurm" / "cluster.sbatch"), "seed=1"]


def test_a_slurm_job_starts_a_run_and_resumes_it_when_it_comes_again(slurm: dict[str, str]) -> None:
    subprocess.run(SBATCH, env=slurm, check=True, timeout=60)
    log = Path(slurm["LOG"]).read_text()
    runs = slurm["RUNS"]
    began = "ray start --head --port=6379 --num-cpus=12 --block"
    joined = "ray start --address=first:6379 --num-cpus=12 --block"
    run_arguments = f"configs/cluster.yaml run.folder={runs} run.name=cluster-7 seed=1"
    assert log.splitlines() == [began, joined, f"python scripts/train.py {run_arguments} at first:6379"]
    run = Path(runs) / "cluster-7"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    subprocess.run(SBATCH, env=slurm, check=True, timeout=60)
    assert f"scripts/train.py --resume {run} seed=1 at first:6379\n" in Path(slurm["LOG"]).read_text()
    assert "requeue" not in Path(slurm["LOG"]).read_text()


def test_a_slurm_job_whose_time_is_up_saves_and_goes_back_into_the_queue(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    waits = tmp_path / "waits"
    job = subprocess.Popen(SBATCH, env=slurm | {"WAITS": str(waits)})
    while not waits.exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert Path(slurm["LOG"]).read_text().endswith("saved\nscontrol requeue 7\n")


def test_a_slurm_job_that_fails_by_itself_is_not_tried_again(slurm: dict[str, str]) -> None:
    assert subprocess.run(SBATCH, env=slurm | {"CODE": "2"}, timeout=60).returncode == 2
    assert "requeue" not in Path(slurm["LOG"]).read_text()


def test_a_slurm_job_that_loses_a_machine_goes_back_into_the_queue(slurm: dict[str, str]) -> None:
    subprocess.run(SBATCH, env=slurm | {"CODE": "2", "LOSES": "1"}, check=True, timeout=60)
    assert Path(slurm["LOG"]).read_text().endswith("scontrol requeue 7\n")
