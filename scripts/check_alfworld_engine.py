"""Compare the ALFWorld engine with TextWorld's, on generated and adversarial games; exit 1 on a difference.

Needs the extra `alfworld-reference`:
    python scripts/check_alfworld_engine.py --games 60 --odd 60 --steps 50
"""

import argparse
import sys
import time

from agentrl.errors import AgentRLError
from agentrl_envs.alfworld.differential import Tally, compare_texts, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=60, help="games as the generator makes them")
    parser.add_argument("--odd", type=int, default=60, help="adversarial games")
    parser.add_argument(
        "--steps", type=int, default=50, help="mixed commands per game, before its walkthrough"
    )
    parser.add_argument("--texts", type=int, default=20_000, help="random texts cut into parts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        tallies = [
            _report(name, count, arguments.steps, arguments.seed, adversarial)
            for name, count, adversarial in (
                ("generated", arguments.games, False),
                ("adversarial", arguments.odd, True),
            )
            if count
        ]
        texts = compare_texts(arguments.texts, arguments.seed)
    except AgentRLError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"texts: {texts.comparisons} compared, {len(texts.differences)} differences")
    tallies.append(texts)
    return int(any(tally.differences or not tally.comparisons for tally in tallies))


def _report(name: str, count: int, steps: int, seed: int, adversarial: bool) -> Tally:
    started = time.process_time()
    tally = run(
        count,
        steps=steps,
        seed=seed,
        adversarial=adversarial,
        report=lambda line: print(f"  {line}", flush=True),
    )
    for difference in tally.differences:
        print(f"DIFFERENCE {difference}")
    print(
        f"{name}: {tally.games} games compared ({tally.refused_by_both} refused by both engines), "
        f"{tally.steps} steps, {tally.comparisons} comparisons, {len(tally.differences)} differences, "
        f"{time.process_time() - started:.0f} CPU s"
    )
    print(f"  task types: {dict(tally.task_types)}")
    print(f"  commands: {dict(tally.verbs.most_common())}")
    return tally


if __name__ == "__main__":
    sys.exit(main())
