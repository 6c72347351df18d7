"""The plan of a run: what it needs, and why it cannot start on this machine, if so."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import psutil
import torch
from rich import box
from rich.filesize import decimal
from rich.table import Table

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.cloning import cloning
from agentrl.data.trajectory import Episode
from agentrl.errors import AgentRLError
from agentrl.planning.env_probe import (
    EPISODES,
    MAX_TURNS,
    EnvProfile,
    check_expert,
    longest_sequence,
    profile_environments,
    stored_episode_bytes,
    tokenize_play,
)
from agentrl.planning.limits import is_open, resolve_limits, text_misfits
from agentrl.planning.memory import (
    checkpoint_bytes,
    episodes_per_step,
    generation_bytes,
    learned_bytes,
    learner_bytes,
    sent_bytes,
    shared_bytes,
    weight_bytes,
)
from agentrl.planning.preflight import (
    capacity_problems,
    check_env_id,
    collect,
    collect_error,
    compute_device,
    port_problems,
    problems,
)
from agentrl.planning.topology import Topology
from agentrl.policy.model import check_packed_forward, context_length, shortened, skeleton
from agentrl.policy.settings import PolicyConfig
from agentrl.run.env_backend import resolve_placements
from agentrl.run.presets import misfits
from agentrl.run.settings import RunConfig
from agentrl.terminal import plain

Section = Literal["processes", "work", "memory", "GPU memory", "GPU memory of an engine", "disk", "time"]
SIZES: tuple[Section, ...] = ("memory", "GPU memory", "GPU memory of an engine", "disk")

_RAY_BYTES = 400_000_000
_ACTOR_BYTES = 55_000_000  # an actor that holds environments, without its workers


@dataclass(frozen=True)
class Line:
    """One fact of a plan.

    Example: Line("memory", "weights", 690_944, "bytes", "172,736 parameters in float32")

    Args:
        section: The section of the plan.
        what: The thing that is counted.
        amount: The amount, or None if only the run itself can tell it.
        unit: The unit of the amount.
        how: The arithmetic or measurement that gave the amount.
    """

    section: Section
    what: str
    amount: float | None
    unit: str
    how: str


@dataclass(frozen=True)
class Plan:
    """Estimate of what a run needs, and the problems that keep it from starting.

    Args:
        lines: The amounts: work and disk of the whole run, processes and memory of one machine.
        missing: The reasons why it cannot start here; empty if it can.
        notes: The lengths that were chosen, and the values that do not suit the policy or the texts of the
            environment.
        nodes: The number of machines.
    """

    lines: tuple[Line, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    nodes: int = 1

    def total(self, section: Section) -> float:
        """Return the sum of the amounts of a section."""
        return sum(line.amount or 0 for line in self.lines if line.section == section)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)


def plan(config: RunConfig, *, processes: int = 1, nodes: int = 1) -> Plan:
    """Return what a run needs and what is missing.

    An environment worker is started, played in, measured and stopped. A cluster or server that the
    configuration names is contacted.

    Args:
        config: The configuration of the run.
        processes: The number of processes that learn, on all machines, as torchrun starts them;
            `learner.processes` takes precedence.
        nodes: The number of machines.

    Raises:
        ConfigError: If `processes` cannot be divided evenly among `nodes`.
    """
    topology = Topology.of(config, processes, nodes)
    found = problems(config, topology)
    collect(found, port_problems(config, topology))
    algorithm, timing, profiles = config.algorithm.build(), "not timed", list[EnvProfile]()
    chosen = list[str]()
    with collect_error(found):
        check_env_id(config)  # a worker would report an unknown id in other words
        config, timing = _resolve_placements(config)
        profiles = profile_environments(config)
        chosen += [
            f"warm start: {name} has no expert to clone, and is left out" for name in check_expert(config)
        ]
    device, played = compute_device(config), _episodes(profiles)
    if is_open(config) and profiles:
        with collect_error(found):
            config, limits = resolve_limits(config, algorithm, played, device, topology.trainers)
            chosen += limits
    topology = replace(topology, config=config)
    lines = [*_process_lines(config, topology, timing), *_work_lines(config, algorithm, profiles)]
    with collect_error(found):
        lines.append(_sequence_line(config.policy))
        lengths = _lengths(config, algorithm, profiles)
        lines += _policy_lines(config, algorithm, device, topology, lengths)
        lines += _engine_lines(config, device, topology, lengths)
    if profiles:
        lines += _environment_lines(config, topology, profiles)
        with collect_error(found):
            lines += _episode_lines(config, algorithm, profiles)
    if topology.ray:
        lines.append(Line("memory", "Ray's own", _RAY_BYTES, "bytes", "as Ray 2.60 took when it was weighed"))
    lines.append(Line("time", "a step", None, "s", "unknown: replies and updates are timed as they happen"))
    lines.sort(key=lambda line: _ORDER.index(line.section))
    amounts = Plan(tuple(lines), nodes=nodes)
    totals = {str(section): int(amounts.total(section)) for section in SIZES}
    collect(found, capacity_problems(config, topology, device, totals))
    missing = tuple(problem.text for problem in found)
    return replace(amounts, missing=missing, notes=(*chosen, *_misfits(config, played)))


def _episodes(profiles: Sequence[EnvProfile]) -> list[Episode]:
    """Return the episodes that were played in all environments."""
    return [episode for profile in profiles for episode in profile.episodes]


def _misfits(config: RunConfig, played: Sequence[Episode]) -> Iterator[str]:
    """Yield the values that do not suit the model at `policy.path`, or what the environment says."""
    if config.policy.path is None:
        return
    with suppress(AgentRLError):  # listed among the problems
        model = skeleton(config.policy)
        yield from misfits(config, sum(parameter.numel() for parameter in model.parameters()))
        if played:
            yield from text_misfits(config, played, context_length(model, None))


_ORDER: tuple[Section, ...] = ("processes", "work", *SIZES, "time")


def plan_table(found: Plan) -> Table:
    """Return a plan as a table for the terminal."""
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


def _resolve_placements(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the configuration with resolved placements, and what was measured for them, in words."""
    config, measured = resolve_placements(config)
    places = {alone.only_env.key: alone.rollout.placement for alone in config.each_alone()}
    key = {"env": "rollout"}  # a single environment has the placement of the block
    given = ", ".join(f"{key.get(name, name)}.placement={place}" for name, place in places.items())
    return config, "; ".join(measured) or f"not timed: {given} was given"


def _process_lines(config: RunConfig, topology: Topology, timing: str) -> list[Line]:
    lines = [
        ("driver", topology.drivers, "learner.launcher=ray: it waits for those that learn"),
        (
            "trainer",
            topology.trainers,
            f"learner.backend={config.learner.backend}, of {topology.ranks} in all",
        ),
        ("environment workers", topology.workers, timing),
        ("environment actors", topology.environment_actors, "of all that learn, for training and the panel"),
        ("engine actors", topology.engine_actors, "of all that learn"),
    ]
    shown = [
        Line("processes", what, count, "processes", how)
        for what, count, how in lines
        if count or what == "environment workers"
    ]
    if topology.ray:
        shown.append(Line("processes", "Ray's own", None, "processes", "unknown: about ten on a machine"))
    return shown


def _work_lines(config: RunConfig, algorithm: Algorithm, profiles: Sequence[EnvProfile]) -> list[Line]:
    rollout, trainer, warm = config.rollout, config.trainer, config.warm_start
    per_step, rounds = episodes_per_step(config, algorithm), algorithm.rollout.rounds
    often = f", at most {rounds} times" if rounds > 1 else ""
    each = f"{rollout.groups_per_step} tasks x {per_step // rollout.groups_per_step}{often}"
    steps, updates = trainer.steps, config.learner.updates_per_step
    lines = [
        Line("work", "episodes of a step", per_step, "episodes", each),
        Line("work", "episodes of training", steps * per_step, "episodes", f"{steps:,} steps{often}"),
        Line("work", "optimiser steps", steps * updates, "steps", f"{updates} in each step"),
    ]
    if algorithm.view is not None:
        seen = algorithm.view.probability(Context(total_steps=trainer.scheduled_steps))
        second = f"the second with changed observations, of {seen:.0%} of the episodes in the first step"
        lines.append(Line("work", "scoring passes of a step", 2, "passes", second))
    if tempered := rollout.groups_per_step * algorithm.rollout.second:
        told = f"of them: {rollout.groups_per_step} tasks x {algorithm.rollout.second}{often}"
        lines.append(Line("work", "at another temperature", tempered, "episodes", told))
    if trainer.mode == "async":
        ahead = f"at most, of {trainer.max_staleness} steps: trainer.max_staleness"
        lines.append(Line("work", "episodes ahead", trainer.max_staleness * per_step, "episodes", ahead))
    if warm.steps:
        lines.append(
            Line("work", "cloning steps", warm.steps, "steps", f"{warm.batch_size} demonstrations in each")
        )
    for profile, env in zip(profiles, config.environments, strict=bool(profiles)):
        plays, checks = _evaluation_episodes(config, profile)
        panel = f"{profile.panel} tasks x {config.evaluation.repeats} for each policy and decoding"
        random = f"measured: {EPISODES} random episodes"
        cut = f", of which some would go on after {MAX_TURNS}" if profile.truncated else ""
        one = f", {profile.label}" if config.names else ""
        share = f", for {profile.share:.0%} of the tasks of a step" if config.names else ""
        lines += [
            Line("work", f"episodes of evaluation{one}", plays + checks, "episodes", panel),
            Line(
                "work",
                f"tasks to train on{one}",
                profile.tasks,
                "tasks",
                f"{env.key}.split={env.split}{share}",
            ),
            Line("work", f"turns of an episode{one}", profile.mean_turns, "turns", random + cut),
        ]
    return lines


def _evaluation_episodes(config: RunConfig, profile: EnvProfile) -> tuple[int, int]:
    """Return the number of evaluation episodes and of instruction-check episodes.

    Scripted players play the panel once, each policy plays it greedily and sampled.
    """
    block = config.evaluation
    names = [name for name in block.baselines if name != "cloned" or config.warm_start.steps]
    scripts = sum(name in ("random", "expert") for name in names)
    between = (config.trainer.steps - 1) // block.every if block.every else 0
    decodings = scripts + 2 * (len(names) - scripts + between + 1)
    checks = 2 * profile.panel if block.instruction_check and profile.has_other_goals else 0
    return decodings * profile.panel * block.repeats, checks


def _sequence_line(policy: PolicyConfig) -> Line:
    """Return the length of a sequence; refuse a model that cannot be run over packed sequences."""
    model = skeleton(policy)
    if policy.path is not None:
        check_packed_forward(model)
    length = context_length(model, policy.max_context)
    how = shortened(model, policy.max_context) or "at most: policy.max_context"
    return Line("work", "tokens of a sequence", length, "tokens", how)


@dataclass(frozen=True)
class _Lengths:
    """Amounts of text in flight, by random play; None where nothing was played.

    Args:
        episode: The mean number of tokens of an episode.
        longest: The number of tokens that a sequence reaches, with the engine's reserve.
        episodes: The number of episodes in flight.
        step: The number of episodes of a training step.
    """

    episode: float | None
    longest: int | None
    episodes: int
    step: int

    def tokens(self, episodes: int, ranks: int) -> int | None:
        """Return the number of tokens of some episodes that each of the ranks learns from."""
        return None if self.episode is None else int(self.episode * episodes / ranks)


def _lengths(config: RunConfig, algorithm: Algorithm, profiles: Sequence[EnvProfile]) -> _Lengths:
    """Return what random play says of the sizes of batches and of the engine's cache."""
    step, active = episodes_per_step(config, algorithm), config.rollout.max_active
    if not profiles:
        return _Lengths(None, None, active, step)
    context = context_length(skeleton(config.policy), config.policy.max_context)
    played = tokenize_play(config, _episodes(profiles), context)
    longest = min(context, longest_sequence(played) * 5 // 4)
    largest = max(step, *(profile.panel for profile in profiles))
    return _Lengths(_mean_tokens(played, profiles), longest, min(active, largest), step)


def _policy_lines(
    config: RunConfig, algorithm: Algorithm, device: torch.device, topology: Topology, lengths: _Lengths
) -> list[Line]:
    """Return the memory and the disk space of the policy and its learner."""
    stages = [(algorithm, config.learner, lengths.step)]
    if config.warm_start.steps:
        stages.append((cloning(), config.warm_start.learner, config.warm_start.batch_size))
    # Only one stage is in memory at a time.
    held = max(
        (
            learner_bytes(
                config,
                stage,
                learner,
                topology.ranks,
                batch_tokens=lengths.tokens(episodes, topology.ranks),
            )
            for stage, learner, episodes in stages
        ),
        key=lambda found: sum(size for size, _ in found.values()),
    )
    here, copies = _device_section(device, topology)
    program = _program_bytes() * (topology.trainers + topology.drivers)
    checkpoint = max(checkpoint_bytes(config, stage, learner) for stage, learner, _ in stages)
    count, counted = _kept_checkpoints(config)
    adapted = config.learner.lora is not None
    shared = [shared_bytes(config, stage, learner) for stage, learner, _ in stages]
    return [
        Line("memory", "program", program, "bytes", "measured: this one, which has loaded the same"),
        *(Line(here, what, size * copies, "bytes", how) for what, (size, how) in held.items()),
        Line("disk", "checkpoints", count * checkpoint, "bytes", counted),
        *(Line("disk", "frozen weights", size, "bytes", how) for size, how in shared if size),
        Line(
            "disk",
            "trained policy",
            learned_bytes(config, config.learner),
            "bytes",
            "a peft folder of adapters" if adapted else "a Hugging Face folder",
        ),
    ]


def _kept_checkpoints(config: RunConfig) -> tuple[int, str]:
    """Return the largest number of checkpoints at a time, and how it was found."""
    keep, every = config.trainer.keep_checkpoints, config.trainer.checkpoint_every
    if keep is not None:
        return keep + 2, f"{keep + 2} at a time: trainer.keep_checkpoints={keep}, the best, and a new one"
    written = sum(-(-steps // every) for steps in (config.warm_start.steps, config.trainer.steps))
    return written, f"{written}, all of them: trainer.keep_checkpoints is null"


def _engine_lines(
    config: RunConfig, device: torch.device, topology: Topology, lengths: _Lengths
) -> list[Line]:
    """Return what vLLM is sent, and the engine's memory without weights that it shares with the learner."""
    engine, weights = config.engine, weight_bytes(skeleton(config.policy))
    lines: list[Line] = []
    if engine.name == "vllm":
        size, how = sent_bytes(config)
        lines.append(Line("work", "sent to vLLM in a step", size, "bytes", how))
    if engine.name == "vllm" and engine.vllm.url is not None:
        return lines  # memory of the server, not of this run
    here, copies = _device_section(device, topology)
    if engine.actors is not None:
        actors, program = topology.engine_actors, _program_bytes()
        here, copies = ("GPU memory of an engine", 1) if engine.actor_gpus else ("memory", actors)
        sent = "weights on their way, two versions of every process"
        lines += [
            Line("memory", "engine actors", program * actors, "bytes", f"{actors} like this program"),
            Line("memory", "Ray's objects", 2 * weights * topology.ranks, "bytes", sent),
        ]
        # vLLM makes its own copy of the weights from the actor's.
        own = "a copy in each"
        if engine.name == "vllm":
            lines.append(Line("memory", "weights of actors", weights * actors, "bytes", own))
        else:
            lines.append(Line(here, "weights of actors", weights * copies, "bytes", own))
    if engine.name == "vllm":
        return [*lines, *_vllm_lines(config, here, copies, weights)]
    active = -(-lengths.episodes // (engine.actors or 1))
    size, how = generation_bytes(config, active, lengths.longest)
    return [*lines, Line(here, "keys and values", size * copies, "bytes", how)]


def _vllm_lines(config: RunConfig, here: Section, copies: int, weights: int) -> list[Line]:
    """Return the memory of vLLM for its copy of the weights and its cache."""
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


def _device_section(device: torch.device, topology: Topology) -> tuple[Section, int]:
    """Return the section for the tensors of ranks, and the number of ranks that share that memory."""
    return ("GPU memory", 1) if device.type == "cuda" else ("memory", topology.trainers)


def _environment_lines(config: RunConfig, topology: Topology, profiles: Sequence[EnvProfile]) -> list[Line]:
    """Return the memory of the environments."""
    lines = [
        _environment_line(
            replace(topology, config=alone), profile, f", {profile.label}" if config.names else ""
        )
        for alone, profile in zip(config.each_alone(), profiles, strict=True)
    ]
    if count := topology.environment_actors:
        how = f"{count} of {decimal(_ACTOR_BYTES)}, as they took when they were weighed"
        lines.append(Line("memory", "environment actors", count * _ACTOR_BYTES, "bytes", how))
    return lines


def _environment_line(topology: Topology, profile: EnvProfile, one: str) -> Line:
    """Return the memory of an environment in training and on its panel."""
    worker, environment = profile.worker_bytes, profile.environment_bytes
    owners = topology.workers or topology.trainers
    size = owners * worker + (topology.environments - owners) * environment
    weighed = (
        f"measured: a worker with one {decimal(worker)}, one more {decimal(environment)}; "
        f"{topology.environments} of training and of the panel"
    )
    return Line("memory", f"environments{one}", size, "bytes", weighed)


def _episode_lines(config: RunConfig, algorithm: Algorithm, profiles: Sequence[EnvProfile]) -> list[Line]:
    """Return the tokens of a step and the disk space of stored episodes."""
    context = context_length(skeleton(config.policy), config.policy.max_context)
    per_step = episodes_per_step(config, algorithm)
    played = tokenize_play(config, _episodes(profiles), context)
    tokens = _mean_tokens(played, profiles)
    chosen = config.rollout.constrained and config.policy.reply not in ("think_action", "subgoal_action")
    replies = "" if chosen else f", replies of engine.max_tokens={config.engine.max_tokens}"
    every = config.trainer.save_episodes_every
    stored = (config.trainer.steps // every if every else 0) * per_step
    stored += sum(_evaluation_episodes(config, profile)[0] for profile in profiles)
    size = stored_episode_bytes(played)
    seen = f"{tokens:,.0f} of an episode as random play has it{replies}; at most {per_step * context:,}"
    plan = algorithm.rollout
    if plan.resamples:
        seen += f"; up to {plan.resamples} discarded replies of each turn are generated besides"
    if "rollout:scores" in algorithm.requires:
        seen += "; the learner reads an episode once more before others branch off it"
    written = f"{stored:,} of {decimal(size)}, measured: random play with made-up numbers of its tokens"
    return [
        Line("work", "tokens of a step", round(tokens * per_step), "tokens", seen),
        Line("disk", "episodes", stored * size, "bytes", written),
    ]


def _mean_tokens(played: Sequence[Episode], profiles: Sequence[EnvProfile]) -> float:
    """Return the mean number of tokens of an episode, of each environment by its share.

    Args:
        played: The episodes of all profiles in order, with their tokens.
        profiles: The profiles.
    """
    mean, rest = 0.0, list(played)
    for profile in profiles:
        own, rest = rest[: len(profile.episodes)], rest[len(profile.episodes) :]
        lengths = [len(turn.prompt_ids) + len(turn.action_ids) for episode in own for turn in episode.turns]
        mean += profile.share * sum(lengths) / len(own)
    return mean
