"""What a run will take, and what it lacks on this machine, found out before anything of it is started."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import psutil
import torch
from rich import box
from rich.filesize import decimal
from rich.table import Table

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.methods.cloning import cloning
from agentrl.data.trajectory import Episode
from agentrl.env.registry import check_id
from agentrl.planning import preflight
from agentrl.planning.env_probe import (
    EPISODES,
    LONGEST,
    Trial,
    as_tokens,
    check_expert,
    environment_factory,
    stored_bytes,
    try_out,
)
from agentrl.planning.memory import (
    checkpoint_bytes,
    generation_bytes,
    held_bytes,
    learned_skeleton,
    weight_bytes,
)
from agentrl.planning.topology import Shares
from agentrl.policy.model import check_packed_forward, context_length, resolve_device, shortened, skeleton
from agentrl.policy.settings import PolicyConfig
from agentrl.rollout.placement import resolve_placement
from agentrl.run.settings import RunConfig
from agentrl.scale.engines import check_engine
from agentrl.terminal import plain

Section = Literal["processes", "work", "memory", "GPU memory", "GPU memory of an engine", "disk", "time"]
SIZES: tuple[Section, ...] = ("memory", "GPU memory", "GPU memory of an engine", "disk")

_CHECKPOINTS = 4  # the last two and the best, and the one that is being written
_RAY_BYTES = 400_000_000
_ACTOR_BYTES = 55_000_000  # of one that holds environments, beside its workers


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
    """What a run takes.

    Args:
        lines: what is known of it: work and disk of all of it, processes and memory of one machine.
        missing: why it cannot start here; empty when it can.
        nodes: machines that it is dealt out to.
    """

    lines: tuple[Line, ...]
    missing: tuple[str, ...] = ()
    nodes: int = 1

    def total(self, section: Section) -> float:
        """Sum of the amounts of a section."""
        return sum(line.amount or 0 for line in self.lines if line.section == section)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def plan(config: RunConfig, *, processes: int = 1, nodes: int = 1) -> Plan:
    """Find out what a run takes and lacks. One worker is started, played in, weighed and stopped.

    A cluster whose address is given is asked what it has.

    Args:
        config: of the run.
        processes: that learn, on all machines together, as torchrun starts them; with `learner.launcher=ray`
            the configuration says how many.
        nodes: machines that they and all actors are dealt out to.

    Raises:
        ConfigError: when `processes` cannot be dealt out to `nodes`.
    """
    shares = Shares.of(config, processes, nodes)
    missing = preflight.Missing()
    missing.look(preflight.of_ranks(config, shares))
    missing.look(preflight.of_folders(config))
    missing.look(preflight.of_engine(config))
    with missing.noted():
        check_engine(config.engine, ranks=shares.ranks)
    algorithm, timed, trial = config.algorithm.build(), "not timed", None
    with missing.noted():
        config, timed = _settled(config)
        trial = try_out(config)
        check_expert(config)
    shares, device = replace(shares, config=config), _device(config, missing)
    missing.look(preflight.of_cluster(config, shares, device))
    with missing.noted():
        preflight.check_algorithm(algorithm, config.engine)
    lines = [*_processes(config, shares, timed), *_work(config, algorithm, trial)]
    with missing.noted():
        lines.append(_sequence_line(config.policy))
        lines += _policy_lines(config, algorithm, device, shares)
        lines += _engine_lines(config, device, shares)
    if trial is not None:
        lines += _environment_lines(config, shares, trial)
        with missing.noted():
            lines += _episode_lines(config, algorithm, trial)
    if shares.ray:
        lines.append(Line("memory", "Ray's own", _RAY_BYTES, "bytes", "as Ray 2.60 took when it was weighed"))
    lines.append(Line("time", "a step", None, "s", "unknown: replies and updates are timed as they happen"))
    lines.sort(key=lambda line: _ORDER.index(line.section))
    found = Plan(tuple(lines), nodes=nodes)
    totals = {str(section): int(found.total(section)) for section in SIZES}
    missing.look(preflight.of_room(config, shares, device, totals))
    return replace(found, missing=tuple(missing))


_ORDER: tuple[Section, ...] = ("processes", "work", *SIZES, "time")


def plan_table(found: Plan) -> Table:
    """A plan for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for section in dict.fromkeys(line.section for line in found.lines):
        total = decimal(int(found.total(section))) if found.total(section) and section in SIZES else ""
        spread = found.nodes > 1 and section in ("processes", "memory")
        told = f"on each of {found.nodes} machines" if spread else "in all" if total else ""
        table.add_row(plain(section, "bold"), plain(total, "bold"), told)
        for line in found.lines:
            if line.section == section:
                table.add_row(plain(f"  {line.what}"), _shown(line), plain(line.how, "dim"))
        table.add_section()
    return table


def _shown(line: Line) -> str:
    if line.amount is None:
        return "?"
    return decimal(int(line.amount)) if line.unit == "bytes" else f"{line.amount:,.10g}"


def _device(config: RunConfig, missing: preflight.Missing) -> torch.device:
    """What the policy computes on; where this machine does not have it, what was asked for."""
    name = config.policy.device
    elsewhere = config.learner.launcher == "ray" and config.rollout.ray.address is not None
    if not elsewhere or name == "auto":
        with missing.noted():
            return resolve_device(name)
    return torch.device(name)


def _settled(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with a placement, and what was measured for it, in words."""
    if config.rollout.workers.interpreter is None:
        check_id(config.env.id)
    rollout, measured = resolve_placement(
        environment_factory(config), config.rollout, config.env.split, config.seed
    )
    given = f"not timed: rollout.placement={rollout.placement} was given"
    return replace(config, rollout=rollout), measured or given


def _processes(config: RunConfig, shares: Shares, timed: str) -> list[Line]:
    lines = [
        ("driver", shares.drivers, "learner.launcher=ray: it waits for those that learn"),
        ("trainer", shares.trainers, f"learner.backend={config.learner.backend}, of {shares.ranks} in all"),
        ("environment workers", shares.workers, timed),
        ("environment actors", shares.environment_actors, "of all that learn, for training and the panel"),
        ("engine actors", shares.engine_actors, "of all that learn"),
    ]
    found = [
        Line("processes", what, count, "processes", how)
        for what, count, how in lines
        if count or what == "environment workers"
    ]
    if shares.ray:
        found.append(Line("processes", "Ray's own", None, "processes", "unknown: about ten on a machine"))
    return found


def _work(config: RunConfig, algorithm: Algorithm, trial: Trial | None) -> list[Line]:
    rollout, trainer, warm = config.rollout, config.trainer, config.warm_start
    per_step, rounds = _episodes_per_step(config, algorithm), algorithm.rollout.rounds
    often = f", at most {rounds} times" if rounds > 1 else ""
    each = f"{rollout.groups_per_step} tasks x {per_step // rollout.groups_per_step}{often}"
    steps, updates = trainer.steps, config.learner.updates_per_step
    lines = [
        Line("work", "episodes of a step", per_step, "episodes", each),
        Line("work", "episodes of training", steps * per_step, "episodes", f"{steps:,} steps{often}"),
        Line("work", "optimiser steps", steps * updates, "steps", f"{updates} in each step"),
    ]
    if trainer.mode == "async":
        ahead = f"at most, of {trainer.max_staleness} steps: trainer.max_staleness"
        lines.append(Line("work", "episodes ahead", trainer.max_staleness * per_step, "episodes", ahead))
    if warm.steps:
        lines.append(
            Line("work", "cloning steps", warm.steps, "steps", f"{warm.batch_size} demonstrations in each")
        )
    if trial is not None:
        plays, checks = _evaluation_episodes(config, trial)
        panel = f"{trial.panel} tasks x {config.evaluation.repeats} for each policy and decoding"
        random = f"measured: {EPISODES} random episodes"
        cut = f", of which some would go on after {LONGEST}" if trial.cut else ""
        lines += [
            Line("work", "episodes of evaluation", plays + checks, "episodes", panel),
            Line("work", "tasks to train on", trial.tasks, "tasks", f"env.split={config.env.split}"),
            Line("work", "turns of an episode", trial.turns, "turns", random + cut),
        ]
    return lines


def _episodes_per_step(config: RunConfig, algorithm: Algorithm) -> int:
    return config.rollout.groups_per_step * (algorithm.rollout.episodes or config.rollout.group_size)


def _evaluation_episodes(config: RunConfig, trial: Trial) -> tuple[int, int]:
    """Plays of the panel, by scripts once and by each policy greedily and sampled; and instruction checks."""
    block = config.evaluation
    names = [name for name in block.baselines if name != "cloned" or config.warm_start.steps]
    scripts = sum(name in ("random", "expert") for name in names)
    between = (config.trainer.steps - 1) // block.every if block.every else 0
    decodings = scripts + 2 * (len(names) - scripts + between + 1)
    checks = 2 * trial.panel if block.instruction_check and trial.other_goals else 0
    return decodings * trial.panel * block.repeats, checks


def _sequence_line(policy: PolicyConfig) -> Line:
    """How long a sequence may be; also whether the model can be run over packed ones at all."""
    model = skeleton(policy)
    if policy.path is not None:
        check_packed_forward(model)
    length = context_length(model, policy.max_context)
    how = shortened(model, policy.max_context) or "at most: policy.max_context"
    return Line("work", "tokens of a sequence", length, "tokens", how)


def _policy_lines(
    config: RunConfig, algorithm: Algorithm, device: torch.device, shares: Shares
) -> list[Line]:
    """What the policy and its learner hold and leave on disk."""
    stages = [(algorithm, config.learner)]
    if config.warm_start.steps:
        stages.append((cloning(), config.warm_start.learner))
    # One stage ends before the other begins.
    held = max(
        (held_bytes(config, *stage, shares.ranks) for stage in stages),
        key=lambda found: sum(size for size, _ in found.values()),
    )
    here, copies = _device_section(device, shares)
    program = _program_bytes() * (shares.trainers + shares.drivers)
    policy = weight_bytes(learned_skeleton(config.policy))
    checkpoint = max(checkpoint_bytes(config, *stage) for stage in stages)
    return [
        Line("memory", "program", program, "bytes", "measured: this one, which has loaded the same"),
        *(Line(here, what, size * copies, "bytes", how) for what, (size, how) in held.items()),
        Line("disk", "checkpoints", _CHECKPOINTS * checkpoint, "bytes", f"{_CHECKPOINTS} at a time"),
        Line("disk", "trained policy", policy, "bytes", "a Hugging Face folder"),
    ]


def _engine_lines(config: RunConfig, device: torch.device, shares: Shares) -> list[Line]:
    """What generates holds beside the weights that it reads."""
    engine, weights = config.engine, weight_bytes(skeleton(config.policy))
    if engine.name == "vllm" and engine.vllm.url is not None:
        return []  # the server's own affair
    lines: list[Line] = []
    here, copies = _device_section(device, shares)
    if engine.actors is not None:
        actors, program = shares.engine_actors, _program_bytes()
        here, copies = ("GPU memory of an engine", 1) if engine.actor_gpus else ("memory", actors)
        sent = "weights on their way, two versions of every process"
        lines = [
            Line("memory", "engine actors", program * actors, "bytes", f"{actors} like this program"),
            Line("memory", "Ray's objects", 2 * weights * shares.ranks, "bytes", sent),
        ]
        # vLLM's own copy is made from one in the memory of its actor.
        own = "a copy in each"
        if engine.name == "vllm":
            lines.append(Line("memory", "weights of actors", weights * actors, "bytes", own))
        else:
            lines.append(Line(here, "weights of actors", weights * copies, "bytes", own))
    if engine.name == "vllm":
        return [*lines, *_vllm_lines(config, here, copies, weights)]
    active = -(-config.rollout.max_active // (engine.actors or 1))
    size, how = generation_bytes(config, active)
    return [*lines, Line(here, "keys and values", size * copies, "bytes", how)]


def _vllm_lines(config: RunConfig, here: Section, copies: int, weights: int) -> list[Line]:
    """Of vLLM: its copy of the weights, and its cache."""
    block = config.engine.vllm
    if here == "memory":
        cache = int(block.cpu_cache_gib * 2**30)
        how = f"engine.vllm.cpu_cache_gib={block.cpu_cache_gib:g}"
        return [
            Line(here, "weights in vLLM", weights * copies, "bytes", "a copy of its own"),
            Line(here, "keys and values", cache * copies, "bytes", how),
        ]
    share, apart = block.gpu_memory_share, weights // block.tensor_parallel_size
    how = f"engine.vllm.gpu_memory_share={share:g} of a GPU: {decimal(apart)} of weights, the rest is cache"
    total = torch.cuda.mem_get_info(0)[1] if torch.cuda.is_available() else None
    return [Line(here, "vLLM", None if total is None else share * total, "bytes", how)]


def _program_bytes() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def _device_section(device: torch.device, shares: Shares) -> tuple[Section, int]:
    """Where a process that learns holds its tensors, and how many do in the same place."""
    return ("GPU memory", 1) if device.type == "cuda" else ("memory", shares.trainers)


def _environment_lines(config: RunConfig, shares: Shares, trial: Trial) -> list[Line]:
    """What environments hold."""
    holders = shares.workers or shares.trainers
    size = holders * trial.worker + (shares.environments - holders) * trial.environment
    weighed = (
        f"measured: a worker with one {decimal(trial.worker)}, one more {decimal(trial.environment)}; "
        f"{shares.environments} of training and of the panel"
    )
    lines = [Line("memory", "environments", size, "bytes", weighed)]
    if count := shares.environment_actors:
        how = f"{count} of {decimal(_ACTOR_BYTES)}, as they took when they were weighed"
        lines.append(Line("memory", "environment actors", count * _ACTOR_BYTES, "bytes", how))
    return lines


def _episode_lines(config: RunConfig, algorithm: Algorithm, trial: Trial) -> list[Line]:
    """The tokens of episodes, and what they leave on disk."""
    context = context_length(skeleton(config.policy), config.policy.max_context)
    per_step = _episodes_per_step(config, algorithm)
    played = as_tokens(config, trial.episodes, context)
    tokens = _tokens(played)
    chosen = config.rollout.constrained and config.policy.reply != "think_action"
    replies = "" if chosen else f", replies of engine.max_tokens={config.engine.max_tokens}"
    every = config.trainer.save_episodes_every
    stored = (config.trainer.steps // every if every else 0) * per_step
    stored += _evaluation_episodes(config, trial)[0]
    size = stored_bytes(played)
    seen = f"{tokens:,.0f} of an episode as random play has it{replies}; at most {per_step * context:,}"
    written = f"{stored:,} of {decimal(size)}, measured: random play with made-up numbers of its tokens"
    return [
        Line("work", "tokens of a step", round(tokens * per_step), "tokens", seen),
        Line("disk", "episodes", stored * size, "bytes", written),
    ]


def _tokens(episodes: list[Episode]) -> float:
    """Of an episode, on average."""
    lengths = [len(turn.prompt_ids) + len(turn.action_ids) for episode in episodes for turn in episode.turns]
    return sum(lengths) / len(episodes)
