"""Measure ScienceWorld beside the package's own `env.step`, and beside its bare `server.step` and score.

All walk through the same actions, in turn, each in its own JVM; CPU seconds are those of Python and of the
JVM together. Figures are medians over the rounds: python scripts/bench_scienceworld.py
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

from agentrl.env import make

TASKS = ("boil", "find-plant", "power-component", "lifespan-longest-lived", "chemistry-mix")
Walk = Callable[[str, Sequence[str]], tuple[float, float]]  # (task, actions) -> wall and CPU seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=12, help="rounds first: a JVM compiles for long")
    parser.add_argument("--steps", type=int, default=20, help="of each task's solution")
    arguments = parser.parse_args()
    solutions = {name: solution(name, arguments.steps) for name in TASKS}
    steps = sum(map(len, solutions.values()))
    rivals: dict[str, Walk] = {
        "ours": ours(),
        "ours, lexicon": ours(actions="lexicon"),
        "ours, valid": ours(actions="valid"),
        "bare server.step and score": stock(bare=True),
        "stock env.step": stock(bare=False),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for round in range(arguments.warm_up + arguments.rounds):
        for name, walk in rivals.items():
            spent = [walk(task, actions) for task, actions in solutions.items()]
            if round >= arguments.warm_up:
                seconds[name].append((sum(wall for wall, _ in spent), sum(cpu for _, cpu in spent)))
    print(f"{'':28}{'steps/s':>10}{'steps/CPU s':>13}{'ours takes, times as many':>28}")
    for name, rounds in seconds.items():
        wall, cpu = (steps / statistics.median(pair[i] for pair in rounds) for i in (0, 1))
        wall_ratio, cpu_ratio = (
            statistics.median(other[i] / own[i] for own, other in zip(seconds["ours"], rounds, strict=True))
            for i in (0, 1)
        )
        print(f"{name:28}{wall:10.0f}{cpu:13.0f}{wall_ratio:15.2f} wall,{cpu_ratio:6.2f} CPU")
    resets()


def solution(name: str, steps: int) -> list[str]:
    """Return the first actions of the task's solution."""
    env = make("agentrl/ScienceWorld-v0", tasks=name, expert=True, max_steps=1000)
    _, info = env.reset(options={"task": f"train/{name}/0"})
    played: list[str] = []
    while len(played) < steps and info["expert"] is not None:
        played.append(info["expert"])
        *_, info = env.step(played[-1])
    env.close()
    return played


def ours(**settings: object) -> Walk:
    env = make("agentrl/ScienceWorld-v0", max_steps=1000, **settings)

    def walk(task: str, actions: Sequence[str]) -> tuple[float, float]:
        env.reset(options={"task": f"train/{task}/0"})
        return timed(lambda: [env.step(action) for action in actions], env.unwrapped.java_pid)

    return walk


def stock(bare: bool) -> Walk:
    from scienceworld import ScienceWorldEnv

    env = ScienceWorldEnv(envStepLimit=10**6)
    pid = env._gateway.java_process.pid

    def walk(task: str, actions: Sequence[str]) -> tuple[float, float]:
        env.load(task, 0, "easy")
        env.server.step("look around")
        if bare:
            return timed(
                lambda: [(env.server.step(action), env.server.getScore()) for action in actions], pid
            )
        return timed(lambda: [env.step(action) for action in actions], pid)

    return walk


def resets() -> None:
    env = make("agentrl/ScienceWorld-v0")
    tasks = env.unwrapped.tasks("train")[:60]
    env.reset(options={"task": tasks[0]})
    spent = [timed(lambda t=task: env.reset(options={"task": t}), env.unwrapped.java_pid) for task in tasks]
    wall, cpu = (statistics.median(pair[i] for pair in spent) * 1e3 for i in (0, 1))
    print(f"reset, without a solution   {wall:8.0f} ms wall, {cpu:.0f} ms CPU")
    own, java = resident(os.getpid()), resident(env.unwrapped.java_pid)
    print(f"memory after 60 resets      {java:8.0f} MiB JVM, {own:.0f} MiB this process")


def timed(work: Callable[[], object], pid: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time() + jvm_seconds(pid)
    work()
    return time.perf_counter() - wall, time.process_time() + jvm_seconds(pid) - cpu


def jvm_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
