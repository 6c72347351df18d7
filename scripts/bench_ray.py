"""What it costs to have environments behind Ray's actors, beside processes of this machine. It starts Ray.

The first table is transport alone: environments that do nothing. The second shows what a second actor brings
where a step waits 20 ms. With `--env`, episodes of a real environment are played to their end instead, in
both places by turns: by chance, or with `--policy` by the default policy with random weights. CPU seconds are
those of all processes, Ray's own included.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from bench_workers import Slow, Still, play

from agentrl.env import Factory
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import Player, RandomPlayer
from agentrl.rollout.settings import RayConfig, RolloutConfig, WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.run.policies import environment_text, fit_policy
from agentrl.run.settings import load_config
from agentrl.scale.cluster import connected
from agentrl.scale.ray_environments import RayEnvironments


def spent() -> float:
    """CPU seconds of this process and all that it has started."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds: wall and CPU."""
    wall, cpu = time.perf_counter(), spent()
    work()
    return time.perf_counter() - wall, spent() - cpu


def in_turns(contenders: dict[str, Callable[[], None]], pairs: int) -> dict[str, tuple[float, float]]:
    """Medians of wall and CPU seconds; each has a first turn that is not counted."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    for _ in range(pairs):
        for name, work in contenders.items():
            found[name].append(timed(work))
    return {
        name: (statistics.median(wall for wall, _ in each), statistics.median(cpu for _, cpu in each))
        for name, each in found.items()
    }


def transport(episodes: int, steps: int, pairs: int) -> None:
    one = WorkersConfig(count=1)
    total = episodes * steps
    with (
        ProcessEnvironments(Still, episodes, WorkersConfig(count=2)) as processes,
        RayEnvironments(Still, episodes, one, RayConfig(actors=2)) as actors,
    ):
        found = in_turns(
            {
                "2 processes": lambda: play(processes, episodes, steps),
                "2 actors of 1 process": lambda: play(actors, episodes, steps),
            },
            pairs,
        )
        messages = actors.messages / (total * (pairs + 1))
    print(f"\n{episodes} episodes at a time, {steps} steps each, median of {pairs}")
    print(f"{'':32}{'us/step wall':>14}{'us/step CPU':>14}")
    for name, (wall, cpu) in found.items():
        print(f"{name:32}{wall / total * 1e6:14.1f}{cpu / total * 1e6:14.1f}")
    print(f"messages per step: {messages:.3f}")


def second_actor(pairs: int) -> None:
    one = WorkersConfig(count=1)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(pairs):
        for count, found in rates.items():
            with RayEnvironments(Slow, 16, one, RayConfig(actors=count)) as environments:
                play(environments, 16, 1)
                wall, _ = timed(lambda place=environments: play(place, 16, 25))
                found.append(16 * 25 / wall)
    single, double = (statistics.median(rates[count]) for count in (1, 2))
    ratio = double / single
    print(f"\n20 ms per step: 1 actor {single:.0f} steps/s, 2 actors {double:.0f} steps/s, ratio {ratio:.2f}")


def fresh_policy(env: str, split: str, environments: Environments, folder: Path) -> Player:
    """Return the policy that a run of the defaults starts with."""
    config = load_config(None, f"env.id={env}", f"env.split={split}", "policy.tokenizer_episodes=4")
    with environments.borrow() as environment:
        tasks = environment.unwrapped.tasks(split)
    texts = partial(environment_text, config, tasks, environments, RandomPlayer())
    policy = fit_policy(config, texts, folder / "tokenizer")
    return policy.player(policy.engine(config), config, 1.0)


def real(env: str, split: str, episodes: int, pairs: int, each: int | None, by_policy: bool) -> None:
    make = Factory(env, split=split)
    config, note = resolve_placement(make, RolloutConfig(placement="process"), split)
    count = config.workers.count or os.cpu_count() or 1
    workers = replace(config.workers, count=count, environments=each or config.workers.environments or 8)
    places = count * (workers.environments or 1)
    steps: list[int] = []

    def collection(environments: Environments) -> None:
        found = collect(specs, player, environments, max_active=places, max_turns=30)
        steps.append(sum(len(episode.turns) for episode in found.episodes))

    with (
        ProcessEnvironments(make, places, workers) as processes,
        RayEnvironments(make, places, workers, RayConfig(actors=1)) as actors,
        TemporaryDirectory() as folder,
    ):
        player = fresh_policy(env, split, processes, Path(folder)) if by_policy else RandomPlayer()
        with processes.borrow() as environment:
            tasks = environment.unwrapped.tasks(split)[:episodes]
        specs = [EpisodeSpec(f"e{number}", env, task, number) for number, task in enumerate(tasks)]
        found = in_turns(
            {"processes": lambda: collection(processes), "an actor": lambda: collection(actors)}, pairs
        )
        messages = actors.messages
    played = statistics.median(steps)
    who = type(player).__name__
    print(f"\n{env}: {len(specs)} episodes of {who}, {played:.0f} steps, {places} at a time; {note}")
    for name, (wall, cpu) in found.items():
        print(f"{name:32}{wall:10.2f} s wall{cpu:10.2f} s CPU{played / wall:10.1f} steps/s")
    slower = found["an actor"][0] / found["processes"][0] - 1
    print(f"an actor is {100 * slower:.0f} % slower; messages per step: {messages / sum(steps[1::2]):.3f}")
    two_real_actors(make, specs, pairs)


def two_real_actors(make: Factory, specs: list[EpisodeSpec], pairs: int) -> None:
    """Measure what a second actor brings; each has one process with one environment, played at random."""
    workers = WorkersConfig(count=1, environments=1)

    def collection(environments: Environments, places: int) -> None:
        collect(specs, RandomPlayer(), environments, max_active=places, max_turns=30)

    with (
        RayEnvironments(make, 1, workers, RayConfig(actors=1)) as one,
        RayEnvironments(make, 2, workers, RayConfig(actors=2)) as two,
    ):
        found = in_turns({"1": lambda: collection(one, 1), "2": lambda: collection(two, 2)}, pairs)
    (single, _), (double, _) = found["1"], found["2"]
    print(f"1 actor {single:.2f} s, 2 actors {double:.2f} s, ratio {single / double:.2f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=32, help="at a time")
    parser.add_argument("--steps", type=int, default=100, help="of each episode")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--env", help="id of a real environment, such as agentrl/ScienceWorld-v0")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tasks", type=int, default=8, help="of the real environment")
    parser.add_argument("--each", type=int, help="real environments of a worker process")
    parser.add_argument("--policy", action="store_true", help="it plays, and not chance")
    args = parser.parse_args()
    began = time.perf_counter()
    with connected(None):
        print(f"Ray has started in {time.perf_counter() - began:.1f} s")
        if args.env is None:
            transport(args.episodes, args.steps, args.pairs)
            second_actor(args.pairs)
        else:
            real(args.env, args.split, args.tasks, args.pairs, args.each, args.policy)


if __name__ == "__main__":
    main()
