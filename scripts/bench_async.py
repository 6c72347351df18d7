"""What playing and learning side by side saves, beside taking turns: the quickstart's games, with slow steps.

Both train for the same steps, by turns. Waiting is what the learner waited for a step to learn from, and the
player to begin one, as shares of the seconds that the steps took.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import sleep
from typing import Any

from agentrl import load_config, train
from agentrl.env import register
from agentrl_envs.alfworld_env import ALFWorldEnv

DELAY = 0.02


class Waiting(ALFWorldEnv):
    """Answers a step as a remote environment would."""

    thread_safe = True

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        sleep(DELAY)
        return super().step(action)


def run(folder: Path, mode: str, steps: int, seed: int) -> dict[str, float]:
    """Train; returns seconds of the whole stage and of who waited."""
    config = load_config(
        None,
        "env.id=bench/Waiting-v0",
        "env.kwargs={task_types: [pick_and_place_simple, look_at_obj_in_light], max_receptacles: 6, "
        "object_types: 8, text: compact, menu: task, max_steps: 16}",
        "rollout.placement=thread",
        f"trainer.mode={mode}",
        f"trainer.steps={steps}",
        "trainer.save_episodes_every=0",
        "policy.tokenizer_episodes=10",
        "warm_start.steps=0",
        "evaluation.tasks=1",
        "evaluation.baselines=[]",
        "evaluation.instruction_check=false",
        f"seed={seed}",
        f"run.folder={folder}",
        f"run.name={mode}-{seed}",
    )
    finished = train(config, quiet=True)
    times = json.loads((finished.folder / "summary.json").read_text())["times"]
    rollout, learning = times["rollout.wall"], times["learning.wall"]
    if mode == "sync":
        return {"seconds": rollout + learning, "learner": rollout, "player": learning}
    return {
        "seconds": learning + times["learning.waited.wall"],
        "learner": times["learning.waited.wall"],
        "player": times["rollout.waited.wall"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    register("bench/Waiting-v0", lambda **kwargs: Waiting(**kwargs))
    found: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.pairs):
            for mode, each in found.items():
                each.append(run(Path(folder), mode, options.steps, seed))
    print(
        f"{options.steps} steps of 64 episodes, {DELAY * 1000:g} ms a step, median of {options.pairs} pairs"
    )
    print(f"{'':8}{'seconds':>10}{'learner waits':>16}{'player waits':>16}")
    for mode, each in found.items():
        seconds, learner, player = (
            statistics.median(row[key] for row in each) for key in ("seconds", "learner", "player")
        )
        print(f"{mode:8}{seconds:10.2f}{learner / seconds:16.1%}{player / seconds:16.1%}")
    ratios = [
        turns["seconds"] / beside["seconds"]
        for turns, beside in zip(found["sync"], found["async"], strict=True)
    ]
    print(f"sync / async: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
