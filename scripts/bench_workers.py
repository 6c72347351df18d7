"""What it costs to have an environment in a process of its own, beside Gymnasium's AsyncVectorEnv.

The environment does nothing, so all that is timed is transport. Ours is what a collector calls; the rival
steps all of its environments together, as it must. They take turns; CPU seconds are those of all processes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import psutil

from agentrl.env import TextSpace
from agentrl.rollout.environments import EnvironmentPool, Environments, ThreadedEnvironments
from agentrl.rollout.play import Reset, Step
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments

OBSERVATION = "You are in the middle of a room. Looking quickly around you, you see a cabinet 1. " * 3
ACTIONS = [f"go to cabinet {n}" for n in range(25)]


class Still(gymnasium.Env[str, str]):
    """Answers at once, always the same; `seconds` makes it wait before that."""

    observation_space = action_space = TextSpace()

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return OBSERVATION, {"success": False, "actions": ACTIONS}

    def step(self, action: str) -> Any:
        if self.seconds:
            time.sleep(self.seconds)
        return OBSERVATION, 0.0, False, False, {"success": False, "actions": ACTIONS}


class Slow(Still):
    """Waits 20 ms."""

    def __init__(self) -> None:
        super().__init__(0.02)


def spent() -> float:
    """CPU seconds of this process and its children."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def play(environments: Environments, episodes: int, steps: int) -> None:
    """Every episode steps as soon as it has its answer."""
    left = {str(number): steps for number in range(episodes)}
    for name in left:
        environments.submit(name, Reset("task", 0))
    while left:
        for name, _ in environments.poll(wait=True):
            if not left[name]:
                environments.release(name)
                del left[name]
                continue
            left[name] -= 1
            environments.submit(name, Step("go to cabinet 3"))


def rival(vector: gymnasium.vector.AsyncVectorEnv, episodes: int, steps: int) -> None:
    """Step all environments in lock-step."""
    vector.reset()
    for _ in range(steps):
        vector.step(("go to cabinet 3",) * episodes)


def timed(work: Callable[[], None], steps: int) -> tuple[float, float]:
    """Microseconds per step: wall and CPU."""
    wall, cpu = time.perf_counter(), spent()
    work()
    return (time.perf_counter() - wall) / steps * 1e6, (spent() - cpu) / steps * 1e6


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=32, help="at a time")
    parser.add_argument("--steps", type=int, default=200, help="of each episode")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    places = {
        "inline": EnvironmentPool(Still),
        "threads": ThreadedEnvironments(Still, args.episodes),
        "1 process": ProcessEnvironments(Still, args.episodes, WorkersConfig(count=1)),
        "2 processes": ProcessEnvironments(Still, args.episodes, WorkersConfig(count=2)),
    }
    vector = gymnasium.vector.AsyncVectorEnv([Still] * args.episodes, shared_memory=False)
    total = args.episodes * args.steps
    contenders: dict[str, Callable[[], None]] = {
        name: (lambda place=place: play(place, args.episodes, args.steps)) for name, place in places.items()
    }
    contenders[f"AsyncVectorEnv, {args.episodes} processes"] = lambda: rival(
        vector, args.episodes, args.steps
    )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()  # starts what has to be started
    for _ in range(args.pairs):
        for name, work in contenders.items():
            found[name].append(timed(work, total))
    print(f"{args.episodes} episodes at a time, {args.steps} steps each, median of {args.pairs}")
    print(f"{'':32}{'us/step wall':>14}{'us/step CPU':>14}")
    for name, figures in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:32}{wall:14.1f}{cpu:14.1f}")
    vector.close()
    for environments in places.values():
        environments.close()
    slow()


def slow() -> None:
    """Two workers against one where each step waits 20 ms."""
    rates = {1: [], 2: []}
    for _ in range(3):
        for count in rates:
            with ProcessEnvironments(Slow, 2 * count, WorkersConfig(count=count, environments=2)) as workers:
                play(workers, 2 * count, 1)
                wall, _ = timed(lambda w=workers, c=count: play(w, 2 * c, 25), 2 * count * 25)
                rates[count].append(1e6 / wall)
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    print(f"20 ms per step: 1 worker {one:.0f} steps/s, 2 workers {two:.0f} steps/s, ratio {two / one:.2f}")


if __name__ == "__main__":
    main()
