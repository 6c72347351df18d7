"""The files for clusters: every key of the example is explained, and the Slurm job does what it says."""

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_key_of_the_cluster_config_is_explained() -> None:
    lines = (ROOT / "configs" / "cluster.yaml").read_text().splitlines()
    keys = [line for line in lines if re.match(r" +\w+: \S", line)]
    assert keys
    assert [line for line in keys if "  # " not in line and line.strip() != "max_steps: 30"] == []


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "scontrol $*" >>"$LOG"; fi',
    "srun": (
        "while [[ $1 == --* ]]; do shift; done\n"
        "export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=16\n"
        'exec "$@"'
    ),
    "ray": (
        'if [ "$1" = status ]; then grep -q -e --head "$LOG" && grep -q -e --address "$LOG"\n'
        'else echo "ray $*" >>"$LOG"; fi'
    ),
    "python": (
        'echo "rank $RANK local $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR: $*" >>"$LOG"\n'
        'if [ -n "${WAITS:-}" ]; then\n'
        '  trap \'echo saved >>"$LOG"; exit 130\' TERM; touch "$WAITS"\n'
        "  for _ in {1..300}; do sleep 0.1; done\n"
        "fi\n"
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
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "first,second",
    }


SBATCH = ["bash", str(ROOT / "configs" / "slurm" / "cluster.sbatch"), "seed=1"]


def test_a_slurm_job_starts_a_run_and_resumes_it_when_it_comes_again(slurm: dict[str, str]) -> None:
    subprocess.run(SBATCH, env=slurm, check=True, timeout=60)
    log = Path(slurm["LOG"]).read_text()
    runs = slurm["RUNS"]
    assert "ray start --head --port=6379 --num-gpus=0 --block" in log
    assert "ray start --address=first:6379 --num-gpus=0 --block" in log
    started = (
        "rank 3 local 1 of 16 at first: "
        f"scripts/train.py configs/cluster.yaml run.folder={runs} run.name=cluster-7 seed=1\n"
    )
    assert started in log
    run = Path(runs) / "cluster-7"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    subprocess.run(SBATCH, env=slurm, check=True, timeout=60)
    assert f"scripts/train.py --resume {run} seed=1\n" in Path(slurm["LOG"]).read_text()
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
