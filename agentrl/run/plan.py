"""What a run will take, and what it lacks on this machine, found out before anything of it is started."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.env.registry import check_id
from agentrl.errors import AgentRLError, ConfigError
from agentrl.learn.learner import provided
from agentrl.policy.model import load_tokenizer, resolve_device
from agentrl.policy.tokens import make_dialogue
from agentrl.rollout.placement import settle
from agentrl.run.footprint import checkpoint_bytes, context_length, held_bytes, skeleton, weight_bytes
from agentrl.run.settings import RunConfig
from agentrl.run.trial import EPISODES, LONGEST, Trial, check_expert, environment_factory, try_out
from agentrl.run.warm_start import cloning

Section = Literal["processes", "memory", "GPU memory", "work", "disk", "time"]

_CHECKPOINTS = 4  # the last two and the best, and the one that is being written
_RENDEZVOUS = 29500  # torchrun's port unless told otherwise
_KNOCK_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Line:
    """One fact of a plan.

    Example: Line("memory", "weights", 690_944, "bytes", "172,736 parameters in float32")

    Args:
        section: that it belongs to.
        what: is counted.
        amount: None for what only the run itself can tell.
        unit: of the amount.
        how: it was found: by which arithmetic, or measured.
    """

    section: Section
    what: str
    amount: float | None
    unit: str
    how: str


@dataclass(frozen=True)
class Plan:
    """What a run takes of one machine.

    Args:
        lines: what is known of it.
        missing: why it cannot start here; empty when it can.
    """

    lines: tuple[Line, ...]
    missing: tuple[str, ...] = ()

    def total(self, section: Section) -> float:
        """Sum of the amounts of a section."""
        return sum(line.amount or 0 for line in self.lines if line.section == section)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Ranks:
    """The processes that learn: all of them, their machines, and those on one machine."""

    all: int
    nodes: int

    @property
    def here(self) -> int:
        return self.all // self.nodes


def plan(config: RunConfig, *, processes: int = 1, nodes: int = 1) -> Plan:
    """Find out what a run takes and lacks. One worker is started, played in, weighed and stopped.

    Args:
        config: of the run.
        processes: that learn, on all machines together, as torchrun starts them.
        nodes: machines that they are on.

    Raises:
        ConfigError: when `processes` cannot be dealt out to `nodes`.
    """
    if min(processes, nodes) < 1 or processes % nodes:
        raise ConfigError(f"{processes} processes on {nodes} nodes: wanted as many on each, and at least one")
    ranks = _Ranks(processes, nodes)
    missing = [*_rank_mistakes(config, ranks), *_folder_mistakes(config), *_cluster_mistakes(config)]
    algorithm, device = config.algorithm.build(), torch.device("cpu")
    timed, trial = "not timed", None
    with _noted(missing):
        config, timed = _settled(config)
        trial = try_out(config)
        check_expert(config)
    with _noted(missing):
        device = resolve_device(config.policy.device)
    lines = [*_processes(config, ranks, timed), *_work(config, algorithm, trial)]
    with _noted(missing):
        lines += _policy_lines(config, algorithm, device, ranks)
        _check_tokenizer(config)
    with _noted(missing):
        _check_algorithm(algorithm)
    if trial is not None:
        lines += _environment_lines(config, algorithm, trial, ranks)
    lines.append(Line("time", "a step", None, "s", "unknown: replies and updates are timed as they happen"))
    found = Plan(tuple(lines))
    return replace(found, missing=(*missing, *_shortages(found, config, device, ranks)))


def plan_table(found: Plan) -> Table:
    """A plan for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for section in dict.fromkeys(line.section for line in found.lines):
        total = decimal(int(found.total(section))) if section in ("memory", "GPU memory", "disk") else ""
        table.add_row(Text(section, style="bold"), Text(total, style="bold"), "in all" if total else "")
        for line in found.lines:
            if line.section == section:
                table.add_row(Text(f"  {line.what}"), _shown(line), Text(line.how, style="dim"))
        table.add_section()
    return table


def _shown(line: Line) -> str:
    if line.amount is None:
        return "?"
    return decimal(int(line.amount)) if line.unit == "bytes" else f"{line.amount:,.10g}"


# What is there, and what is not.


@contextmanager
def _noted(missing: list[str]) -> Iterator[None]:
    """What goes wrong in a foreseen way is one thing more that is missing."""
    try:
        yield
    except (AgentRLError, OSError) as error:
        missing.append(str(error))


def _rank_mistakes(config: RunConfig, ranks: _Ranks) -> Iterator[str]:
    if ranks.all == 1:
        return
    if config.learner.backend == "single":
        yield f"learner.backend is single, wanted fsdp for {ranks.all} processes"
    if config.rollout.groups_per_step % ranks.all:
        yield (
            f"rollout.groups_per_step is {config.rollout.groups_per_step}, wanted a multiple of the "
            f"{ranks.all} processes"
        )
    port = int(os.environ.get("MASTER_PORT", _RENDEZVOUS))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield f"torchrun --master-port: {port} cannot be had ({error.strerror}); choose another"


def _folder_mistakes(config: RunConfig) -> Iterator[str]:
    block = config.run
    folder = Path(block.folder)
    if block.name is not None and (folder / block.name).exists():
        yield f"run.name is {block.name!r}, but {folder / block.name} exists; resume it or choose another"
    there = _existing(folder)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        yield f"run.folder is {block.folder!r}, which cannot hold runs: {there} is no folder to write to"


def _cluster_mistakes(config: RunConfig) -> Iterator[str]:
    if config.rollout.backend != "ray":
        return
    block = config.rollout.ray
    if find_spec("ray") is None:
        yield "rollout.backend=ray needs Ray: pip install 'agentrl[ray]'"
    if block.address is None:
        wanted, there = (block.actors or 1) * block.cpus, os.cpu_count() or 1
        if wanted > there:
            yield f"rollout.ray: actors x cpus is {wanted:g}, wanted at most the {there} of this machine"
    elif block.address != "auto":
        host, _, port = block.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _KNOCK_TIMEOUT).close()
        except OSError as error:
            yield f"rollout.ray.address: nothing answers at {block.address} ({error})"


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _check_tokenizer(config: RunConfig) -> None:
    block = config.policy
    if block.path is not None:
        make_dialogue(
            load_tokenizer(block.path), reply=block.reply, max_observation_tokens=block.max_observation_tokens
        )


def _check_algorithm(algorithm: Algorithm) -> None:
    """Refuse one that requires what no learner provides."""
    wanted = algorithm.requires
    check_requirements(algorithm, provided(reference="reference" in wanted, critic="values" in wanted))


def _shortages(found: Plan, config: RunConfig, device: torch.device, ranks: _Ranks) -> Iterator[str]:
    """What there is too little of."""
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if ranks.here > there:
            yield f"GPUs: {ranks.here} wanted on this machine, one for each process, and {there} found"
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(there))
        yield from _shortage(found, "GPU memory", free, "lower learner.micro_batch_tokens")
    memory = psutil.virtual_memory().available
    yield from _shortage(found, "memory", memory, "lower rollout.max_active")
    disk = shutil.disk_usage(_existing(Path(config.run.folder))).free
    yield from _shortage(found, "disk", disk, "make room where run.folder is")


def _shortage(found: Plan, section: Section, there: int, remedy: str) -> Iterator[str]:
    wanted = int(found.total(section))
    if wanted > there:
        yield f"{section}: at most {decimal(wanted)} wanted, {decimal(there)} free; {remedy}"


# What is taken.


def _settled(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with a placement, and what was measured for it, in words."""
    if config.rollout.workers.interpreter is None:
        check_id(config.env.id)
    rollout, measured = settle(environment_factory(config), config.rollout, config.env.split, config.seed)
    given = f"not timed: rollout.placement={rollout.placement} was given"
    return replace(config, rollout=rollout), measured or given


@dataclass(frozen=True)
class _Places:
    """Where the environments on this machine are: in processes, those of Ray actors as well, or in none."""

    actors: int
    workers: int
    environments: int


def _places(config: RunConfig, ranks: _Ranks) -> _Places:
    """Those of training and, beside them, those of the panel, of every process that learns."""
    block, sets = config.rollout, 2 * ranks.here
    if block.placement != "process":
        return _Places(0, 0, sets * block.max_active)
    share, actors = block.max_active, 0
    if block.backend == "ray":
        each = block.ray.actors or ranks.nodes
        share, actors = -(-share // each), -(-2 * ranks.all * each // ranks.nodes)
        sets = actors
    workers = min(block.workers.count or os.cpu_count() or 1, share)
    held = min(share, workers * (block.workers.environments or -(-share // workers)))
    return _Places(actors, sets * workers, sets * held)


def _processes(config: RunConfig, ranks: _Ranks, timed: str) -> list[Line]:
    places = _places(config, ranks)
    lines = [
        Line("processes", "trainer", ranks.here, "processes", f"learner.backend={config.learner.backend}"),
        Line("processes", "environment workers", places.workers, "processes", timed),
    ]
    if config.rollout.backend == "ray":
        lines += [
            Line("processes", "Ray actors", places.actors, "processes", "of all that learn, dealt out"),
            Line("processes", "Ray's own", None, "processes", "unknown: it starts about ten on a machine"),
        ]
    return lines


def _environment_lines(config: RunConfig, algorithm: Algorithm, trial: Trial, ranks: _Ranks) -> list[Line]:
    """What its environments hold, and what their episodes leave on disk."""
    places = _places(config, ranks)
    workers = places.workers or 2 * ranks.here
    size = workers * trial.worker + (places.environments - workers) * trial.environment
    stored = _stored_episodes(config, algorithm, trial)
    weighed = (
        f"measured: a worker with one {decimal(trial.worker)}, one more {decimal(trial.environment)}; "
        f"{places.environments} of training and of the panel"
    )
    written = (
        f"{stored:,} of {decimal(trial.stored)}, measured: the text of random play; "
        "unknown: the tokens of a policy's replies"
    )
    return [
        Line("memory", "environments", size, "bytes", weighed),
        Line("disk", "episodes", stored * trial.stored, "bytes", written),
    ]


def _work(config: RunConfig, algorithm: Algorithm, trial: Trial | None) -> list[Line]:
    rollout, steps, warm = config.rollout, config.trainer.steps, config.warm_start
    per_step, rounds = _episodes_per_step(config, algorithm), algorithm.rollout.rounds
    often = f", at most {rounds} times" if rounds > 1 else ""
    each = f"{rollout.groups_per_step} tasks x {per_step // rollout.groups_per_step}{often}"
    updates = config.learner.updates_per_step
    lines = [
        Line("work", "episodes of a step", per_step, "episodes", each),
        Line("work", "episodes of training", steps * per_step, "episodes", f"{steps:,} steps{often}"),
        Line("work", "optimiser steps", steps * updates, "steps", f"{updates} in each step"),
        Line("work", "cloning steps", warm.steps, "steps", f"{warm.batch_size} demonstrations in each"),
    ]
    if trial is not None:
        plays, checks = _evaluation_episodes(config, trial)
        panel = f"{trial.panel} tasks x {config.evaluation.repeats} for each policy and decoding"
        random = f"measured: {EPISODES} random episodes of at most {LONGEST} turns"
        lines += [
            Line("work", "episodes of evaluation", plays + checks, "episodes", panel),
            Line("work", "tasks to train on", trial.tasks, "tasks", f"env.split={config.env.split}"),
            Line("work", "turns of an episode", trial.turns, "turns", random),
        ]
    return lines


def _episodes_per_step(config: RunConfig, algorithm: Algorithm) -> int:
    return config.rollout.groups_per_step * (algorithm.rollout.episodes or config.rollout.group_size)


def _stored_episodes(config: RunConfig, algorithm: Algorithm, trial: Trial) -> int:
    every = config.trainer.save_episodes_every
    steps = config.trainer.steps // every if every else 0
    return steps * _episodes_per_step(config, algorithm) + _evaluation_episodes(config, trial)[0]


def _evaluation_episodes(config: RunConfig, trial: Trial) -> tuple[int, int]:
    """Plays of the panel, by scripts once and by each policy greedily and sampled; and instruction checks."""
    block = config.evaluation
    names = [name for name in block.baselines if name != "cloned" or config.warm_start.steps]
    scripts = sum(name in ("random", "expert") for name in names)
    between = (config.trainer.steps - 1) // block.every if block.every else 0
    decodings = scripts + 2 * (len(names) - scripts + between + 1)
    checks = 2 * trial.panel if block.instruction_check and trial.other_goals else 0
    return decodings * trial.panel * block.repeats, checks


def _policy_lines(config: RunConfig, algorithm: Algorithm, device: torch.device, ranks: _Ranks) -> list[Line]:
    """What the policy and its learner hold and leave on disk, and how many tokens they see."""
    stages = [(algorithm, config.learner)]
    if config.warm_start.steps:
        stages.append((cloning(), config.warm_start.learner))
    # One stage ends before the other begins.
    held = max(
        (held_bytes(config, *stage, ranks.all) for stage in stages),
        key=lambda found: sum(size for size, _ in found.values()),
    )
    here: Section = "GPU memory" if device.type == "cuda" else "memory"
    copies = ranks.here if here == "memory" else 1
    program = psutil.Process().memory_info().rss * ranks.here
    checkpoint = max(checkpoint_bytes(config, *stage) for stage in stages)
    model = skeleton(config.policy)
    context = context_length(config, model)
    seen = _episodes_per_step(config, algorithm) * context
    return [
        Line("work", "tokens of a step", seen, "tokens", f"at most: {context:,} of an episode"),
        Line("memory", "program", program, "bytes", "measured: this one, which has loaded the same"),
        *(Line(here, what, size * copies, "bytes", how) for what, (size, how) in held.items()),
        Line("disk", "checkpoints", _CHECKPOINTS * checkpoint, "bytes", f"{_CHECKPOINTS} at a time"),
        Line("disk", "trained policy", weight_bytes(model), "bytes", "a Hugging Face folder"),
    ]
