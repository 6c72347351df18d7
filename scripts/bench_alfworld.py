"""Measure the ALFWorld engine and generator in CPU seconds, beside TextWorld's engine where it is installed.

Every figure is the median of `--repeats` measurements: python scripts/bench_alfworld.py
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from random import Random

from agentrl.env import make
from agentrl.errors import AgentRLError
from agentrl_envs.alfworld.engine import Game
from agentrl_envs.alfworld.games import game_file
from agentrl_envs.alfworld.generate import GeneratedGame, Options, generate
from agentrl_envs.alfworld.reference import ReferenceEngine

ROOMS = {"whole rooms": Options(), "small rooms (6 receptacles)": Options(max_receptacles=6, object_types=8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=60, help="games per measurement")
    parser.add_argument("--steps", type=int, default=50, help="random admissible commands per game")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rates = {
        name: measure(name, options, arguments.games, arguments.steps, arguments.repeats)
        for name, options in ROOMS.items()
    }
    try:
        rival(rates, arguments.steps)
    except AgentRLError as error:
        print(f"TextWorld: not measured: {error}")


def measure(name: str, options: Options, games: int, steps: int, repeats: int) -> float:
    """Print the figures for one kind of room; return fresh steps per CPU second."""
    made = [
        [generate("train", repeat * games + i, options) for i in range(games)] for repeat in range(repeats)
    ]
    load(made[0][0])
    generating = [
        cpu(lambda r=repeat: _generate(options, 10_000 + r * games, games)) for repeat in range(repeats)
    ]
    loads, fresh, warm = [], [], []
    for batch in made:
        for game in batch:
            loads.append(cpu(lambda g=game: load(g)))
        loaded = [load(game) for game in batch]
        fresh.append(games * steps / cpu(lambda g=loaded: walk(g, steps)))
        warm.append(games * steps / cpu(lambda g=loaded: walk(g, steps)))
    print(f"{name}:")
    print(f"  generate      {games / statistics.median(generating):10,.0f} games/s")
    print(f"  load          {statistics.median(loads) * 1e3:10.2f} ms (longest {max(loads) * 1e3:.2f})")
    print(f"  fresh games   {statistics.median(fresh):10,.0f} steps/s ({steps} each, command list included)")
    print(f"  same, again   {statistics.median(warm):10,.0f} steps/s")
    settings = {"max_receptacles": options.max_receptacles, "object_types": options.object_types}
    environment = make("agentrl/ALFWorld-v0", **settings)
    played = statistics.median(episodes(environment, games, steps) for _ in range(repeats))
    print(f"  environment   {played:10,.0f} steps/s (making and loading a game per episode included)")
    known = environment.unwrapped
    snapshot = statistics.median(
        cpu(lambda: [known.snapshot() for _ in range(10_000)]) for _ in range(repeats)
    )
    print(f"  snapshot      {snapshot / 10_000 * 1e6:10.2f} us")
    return statistics.median(fresh)


def _generate(options: Options, first: int, count: int) -> None:
    for index in range(first, first + count):
        generate("train", index, options)


def cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def load(made: GeneratedGame) -> Game:
    file = game_file(made)
    return Game(file["pddl_domain"], file["pddl_problem"], file["grammar"])


def walk(games: Sequence[Game], steps: int) -> None:
    rng = Random(0)
    for game in games:
        state = game.start
        for _ in range(steps):
            state = game.advance(state, rng.choice(state.admissible))


def episodes(environment: object, count: int, steps: int) -> float:
    rng, played, started = Random(time.perf_counter_ns()), 0, time.process_time()
    for _ in range(count):
        _, info = environment.reset(options={"task": f"train/{rng.randrange(1_000_000)}"})
        for _ in range(steps):
            _, _, terminated, truncated, info = environment.step(rng.choice(info["actions"]))
            played += 1
            if terminated or truncated:
                break
    return played / (time.process_time() - started)


def rival(ours: dict[str, float], steps: int, games: int = 6) -> None:
    """Print TextWorld's rate on games of the same kinds, and how many times as fast ours is."""
    engine = ReferenceEngine()
    try:
        for name, options in ROOMS.items():
            rng, loading, stepping = Random(0), 0.0, 0.0
            for index in range(games):
                file = game_file(generate("train", index, options))
                loading += cpu(lambda f=file: engine.begin(f))
                state = engine.reset()
                started = time.process_time()
                for _ in range(steps):
                    state = engine.step(rng.choice(state.admissible))[0]
                stepping += time.process_time() - started
            rate = games * steps / stepping
            print(
                f"TextWorld, {name}: load and reset {loading / games * 1e3:,.0f} ms, {rate:,.1f} steps/s: "
                f"ours takes {ours[name] / rate:,.0f} times as many steps"
            )
    finally:
        engine.close()


if __name__ == "__main__":
    main()
