"""Start a run or continue one: in this process, among the processes of torchrun, or on Ray."""

import os
from functools import partial
from pathlib import Path

import torch

from agentrl.learn.ranks import process_group
from agentrl.policy.model import resolve_device
from agentrl.run.folder import Run, open_run
from agentrl.run.resumption import with_overrides
from agentrl.run.settings import RunConfig
from agentrl.run.signals import Interruption
from agentrl.run.trust import check_confirmed
from agentrl.scale.extras import check_ray
from agentrl.training.setup import open_session
from agentrl.training.trainer import Trainer


def train(config: RunConfig, *, quiet: bool = False) -> Run:
    """Train a policy as `config` says, from the baselines to the report.

    Args:
        config: The configuration of the run.
        quiet: Show no progress.

    Raises:
        AgentRLError: The configuration, the environment or a file is wrong; what was done is kept.
        RunInterrupted: After Ctrl-C or SIGTERM; `resume(run.folder)` continues.
    """
    return _run(config, None, quiet)


def resume(folder: str | Path, *overrides: str, quiet: bool = False) -> Run:
    """Continue an interrupted run; the result equals that of a run that never stopped.

    Args:
        folder: The folder of the run, or its name below `runs/`.
        overrides: `key=value` for the keys that may change. Programs, servers and folders that the run's
            configuration names are used only if they are named again here, see `trust.CALLER_ONLY_KEYS`.
        quiet: Show no progress.

    Raises:
        ConfigError: Another key would change, or something is not named again.
        AgentRLError: As in `train`.
    """
    stored = open_run(folder)
    check_confirmed(str(stored.folder), stored.config, overrides)
    active = with_overrides(stored, overrides)
    return _run(active.config, active, quiet)


def _run(config: RunConfig, active: Run | None, quiet: bool) -> Run:
    if config.learner.launcher == "ray" and "RANK" not in os.environ:
        return _run_on_ray(config, active, quiet)
    device = resolve_device(config.policy.device)
    with process_group(device) as ranks, Interruption().listening() as interruption:
        session = open_session(config, active, interruption=interruption, ranks=ranks)
        try:
            return Trainer(session, quiet=quiet).run()
        finally:
            session.close()


def _run_on_ray(config: RunConfig, active: Run | None, quiet: bool) -> Run:
    check_ray("learner.launcher=ray")
    from agentrl.scale.ray_ranks import run_on_ray

    device, count = config.policy.device, config.learner.processes
    on_gpus = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    assert count is not None
    with Interruption().listening():
        folder = run_on_ray(
            partial(_run_rank, config, active, quiet),
            count,
            address=config.rollout.ray.address,
            gpus=float(on_gpus),
        )
    return Run(folder, config)


def _run_rank(config: RunConfig, active: Run | None, quiet: bool) -> Path:
    return _run(config, active, quiet).folder
