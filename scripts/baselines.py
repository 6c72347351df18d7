"""Random and expert play on a fixed panel of every built-in environment, as a table of docs/results.md.

python scripts/baselines.py                                  # prints Markdown; minutes
python scripts/baselines.py agentrl/Reasoning-v0 --tasks 20  # some of it
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import agentrl
from agentrl.evaluation.scores import Evaluation

# Environment, split, arguments: what its panel consists of, and what lets a random player choose.
PANELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("agentrl/ALFWorld-v0", "valid_unseen", {}),
    ("agentrl/ScienceWorld-v0", "test", {"actions": "lexicon", "max_steps": 150}),
    ("agentrl/WebShop-v0", "test", {}),
    ("agentrl/MathTools-v0", "test", {}),
    ("agentrl/Reasoning-v0", "test", {}),
    ("agentrl/ReasoningGym-v0", "test", {"dataset": "chain_sum"}),
)
HEAD = ("environment", "panel", "random %", "expert %", "steps/s random", "steps/s expert")


def row(env: str, split: str, kwargs: dict[str, Any], tasks: int) -> tuple[list[str], dict[str, Any]]:
    """One line of the table, and all that was measured for it."""
    found: dict[str, Evaluation] = {}
    for policy in ("random", "expert"):
        began = time.perf_counter()
        found[policy] = agentrl.evaluate(policy, env=env, split=split, tasks=tasks, env_kwargs=kwargs)
        print(f"{env} {policy}: {time.perf_counter() - began:.0f} s", flush=True)
    label = ", ".join(f"{key}={value}" for key, value in kwargs.items())
    scores = [found[policy] for policy in ("random", "expert")]
    first = scores[0]
    panel = f"{tasks} of {split}, {first.panel_hash[:12]}" + (f"; {first.data}" if first.data else "")
    cells = [
        f"`{env}`" + (f" {label}" if label else ""),
        panel,
        *map(rate, scores),
        *(f"{score.steps_per_second:,.0f}" for score in scores),
    ]
    return cells, {policy: score.to_dict() for policy, score in found.items()}


def rate(score: Evaluation) -> str:
    """Success with its interval, and what was aborted."""
    if score.success.success_rate is None:
        return f"all {score.aborted} aborted"
    low, high = score.success.interval
    text = f"{100 * score.success.success_rate:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
    return text + (f" ({score.aborted} aborted)" if score.aborted else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("envs", nargs="*", help="some of the environments; all by default")
    parser.add_argument("--tasks", type=int, default=120, help="of each panel")
    parser.add_argument("--output", type=Path, help="write all that was measured as JSON")
    given = parser.parse_args()
    rows, measured = [], {}
    for env, split, kwargs in PANELS:
        if not given.envs or env in given.envs:
            cells, measured[env] = row(env, split, kwargs, given.tasks)
            rows.append(cells)
    for cells in (HEAD, ["---"] * len(HEAD), *rows):
        print(f"| {' | '.join(cells)} |")
    if given.output is not None:
        given.output.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
