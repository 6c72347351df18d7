"""Measure WebShop in CPU seconds: load, index, reset, steps, memory, and how often random and oracle succeed.

    python scripts/bench_webshop.py                       # 1,000 and 100,000 generated products
    python scripts/bench_webshop.py --data folder         # and the user's own files

Steps are random walks over what is offered, searches among them. Their rival is the same walk with rankings
that are not remembered, measured in turns with it. There is nothing to run the original with here: its own
figure, 51 to 56 steps per CPU second without search, is cited from specs/webshop-and-math.md, not measured.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import psutil

from agentrl_envs.webshop.generate import write
from agentrl_envs.webshop.search import SearchIndex, document
from agentrl_envs.webshop_env import WebShopEnv

PAIRS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", type=int, nargs="*", default=[1_000, 100_000], help="sizes to generate")
    parser.add_argument("--data", type=Path, help="folder of the user's own files, as well")
    parser.add_argument("--steps", type=int, default=20_000, help="per measurement")
    parser.add_argument("--panel", type=int, default=300, help="tasks of the split test, for success")
    arguments = parser.parse_args()
    load = psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
    print(
        f"load average per core: {load:.1f}" + (" (busy: CPU seconds are pessimistic)" if load > 0.5 else "")
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.products:
            data = Path(folder) / str(size)
            started = time.process_time()
            write(data, products=size)
            print(
                f"{size:,} generated products ({time.process_time() - started:.1f} s to generate):",
                flush=True,
            )
            alone(measure, data, Path(folder) / f"cache{size}", arguments.steps, arguments.panel)
        if arguments.data is not None:
            print(f"{arguments.data}:", flush=True)
            alone(measure, arguments.data, Path(folder) / "cache", arguments.steps, arguments.panel)


def alone(work: Callable[..., None], *arguments: Any) -> None:
    """Work in a process of its own, whose memory is nobody else's."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def measure(data: Path, cache: Path, steps: int, panel: int) -> None:
    """Print the figures of one set of files."""
    before = megabytes()
    settings: dict[str, Any] = {"data": data, "split_rule": "product", "cache": cache}
    loading = cpu(lambda: WebShopEnv(**settings))
    env = WebShopEnv(**settings)
    shop = env.shop
    loaded = megabytes()
    building = cpu(lambda: shop.search("a first search"))
    indexed = megabytes()
    print(f"  load          {loading:10.2f} s, {len(shop.catalogue):,} products, {len(shop.goals):,} goals")
    print(f"  index         {building:10.2f} s to build, analysis and sorting included")
    print(f"  memory        {loaded - before:10.0f} MB of products, {indexed - loaded:.0f} of the index")
    tasks = env.tasks("train")
    rng = Random(0)
    drawn = [rng.choice(tasks) for _ in range(2000)]
    resetting = cpu(lambda: [env.reset(options={"task": task}) for task in drawn])
    print(f"  reset         {resetting / len(drawn) * 1e6:10.1f} us")
    walk(env, tasks, 2000, 0)
    forgetful = WebShopEnv(**settings)
    vars(forgetful)["shop"] = remembering_nothing(shop)
    rates, rivals = [], []
    for pair in range(PAIRS):
        rates.append(walk(env, tasks, steps, pair))
        rivals.append(walk(forgetful, tasks, max(1, steps // 10), pair))
    rate, rival = statistics.median(rates), statistics.median(rivals)
    print(f"  steps         {rate:10,.0f} per CPU second")
    print(f"                {rival:10,.0f} with each search worked out anew: ratio {rate / rival:.1f}")
    succeeded(env, settings, panel)


def remembering_nothing(shop: Any) -> Any:
    """Return the same shop without a cache of rankings."""
    texts = (
        document(one.title, one.description, one.bullets[0] if one.bullets else "", one.options)
        for one in shop.catalogue.products
    )
    index = SearchIndex.build(list(shop.catalogue.by_asin), texts)
    return replace(shop, search=lambda query: index._rank_documents(query, 50)[0])


def succeeded(env: WebShopEnv, settings: dict[str, Any], panel: int) -> None:
    """Print success and score of random and oracle play on the first tasks of the split test."""
    tasks = list(env.tasks("test"))[:panel]
    for name, reward in (("random", "original"), ("oracle", "original"), ("oracle", "fixed")):
        played = WebShopEnv(**settings, reward=reward, expert=name == "oracle")
        rng = Random(0)
        scores = []
        for task in tasks:
            _, info = played.reset(options={"task": task})
            over = False
            while not over:
                action = info["expert"] if name == "oracle" else rng.choice(info["actions"])
                _, _, terminated, truncated, info = played.step(action)
                over = terminated or truncated
            scores.append(info["score"])
        won = sum(score == 1.0 for score in scores)
        low, high = wilson(won, len(scores))
        print(
            f"  {name:6}, {reward:8} success {won / len(scores):.3f} [{low:.3f}, {high:.3f}] "
            f"on {len(scores)} tasks, score {100 * statistics.fmean(scores):.1f}"
        )


def walk(env: WebShopEnv, tasks: Sequence[str], steps: int, seed: int) -> float:
    """Return steps per CPU second of a random walk, resets included."""
    rng, played, started = Random(seed), 0, time.process_time()
    while played < steps:
        _, info = env.reset(options={"task": rng.choice(tasks)})
        over = False
        while not over:
            _, _, terminated, truncated, info = env.step(rng.choice(info["actions"]))
            over, played = terminated or truncated, played + 1
    return played / (time.process_time() - started)


def wilson(won: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share."""
    z = 1.959964
    middle = (won + z * z / 2) / (count + z * z)
    half = z * math.sqrt(won * (count - won) / count + z * z / 4) / (count + z * z)
    return middle - half, middle + half


def megabytes() -> float:
    size: int = psutil.Process().memory_info().rss
    return size / 2**20


def cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
