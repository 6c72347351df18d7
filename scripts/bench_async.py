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


class Waiting(ALFWorldEnv):
    """Answers a step as a remote environment would, after `delay` seconds."""

    thread_safe = True

    def __init__(self, delay: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._delay = delay

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        sleep(self._delay)
        return super().step(action)


def run(folder: Path, mode: str, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train; returns seconds of the whole stage and of who waited."""
    config = load_config(
        None,
        "env.id=bench/Waiting-v0",
        "env.kwargs={task_types: [pick_and_place_simple, look_at_obj_in_light], max_receptacles: 6, "
        f"object_types: 8, text: compact, menu: task, max_steps: 16, delay: {options.delay}}}",
        "rollout.placement=thread",
        f"trainer.mode={mode}",
        f"trainer.steps={options.steps}",
        f"learner.epochs={options.epochs}",
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
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds that an environment's step takes")
    parser.add_argument("--epochs", type=int, default=8, help="updates of a step")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    register("bench/Waiting-v0", lambda **kwargs: Waiting(**kwargs))
    found: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.pairs):
            for mode, each in found.items():
                each.append(run(Path(folder), mode, options, seed))
    print(
        f"{options.steps} steps x 64 episodes, {1000 * options.delay:g} ms a turn, {options.epochs} updates"
    )
    print(f"median of {options.pairs} pairs")
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
