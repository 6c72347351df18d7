"""GRPO on one screen: the calls that `agentrl train` makes, without its checkpoints, reports and processes.

The game: a lamp shows a colour, and the button of that colour must be pressed, twice. A small policy with random
weights learns it in seconds on a CPU.

    python scripts/minimal_grpo.py
"""

import sys

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.data import Group
from agentrl.env import MultiTurnEnv
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig
from agentrl.policy.engine import SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer, make_dialogue
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import LanguagePlayer

COLOURS = ("red", "green", "blue", "yellow")


class Lamp(MultiTurnEnv):
    """Press the button that has the colour of the lamp, twice."""

    splits = ("train",)

    def problems(self, split):
        return [(first, second) for second in COLOURS for first in COLOURS]

    def start(self, problem):
        self.shown = list(problem)
        return f"the lamp is {self.shown[0]}"

    def actions(self):
        return [f"press {colour}" for colour in COLOURS]

    def act(self, action):
        if action != f"press {self.shown.pop(0)}":
            return "wrong", 0.0, True
        return f"right, the lamp is {self.shown[0] if self.shown else 'off'}", 1.0, not self.shown


def main(steps=30, groups=8, group_size=8, seed=0):
    tokenizer = fit_tokenizer(
        [f"right, the lamp is {colour} off wrong press {colour}" for colour in COLOURS], 300
    )
    model = build_model(PolicyConfig(device="cpu"), tokenizer, seed)
    dialogue = make_dialogue(tokenizer)
    engine = TorchEngine(model, stop_ids=dialogue.stop_ids)
    player = LanguagePlayer(dialogue, engine, SamplingParams(temperature=1.0, max_tokens=8))
    algorithm, learner = (
        GRPO().build(),
        Learner(model, LearnerConfig(learning_rate=3e-3, matrix_learning_rate=1e-2)),
    )
    environments, tasks = EnvironmentPool(Lamp), Lamp().tasks("train")

    rates = []
    for step in range(steps):
        context = Context(step=step, total_steps=steps, seed=seed)
        # Collect: a group is one task, played several times from the same start.
        drawn = [tasks[(step * groups + index) % len(tasks)] for index in range(groups)]
        specs = [
            EpisodeSpec(f"{step}-{index}-{member}", "Lamp", task, seed=step * groups + index)
            for index, task in enumerate(drawn)
            for member in range(group_size)
        ]
        episodes = collect(specs, player, environments, max_active=32).episodes
        starts = range(0, len(episodes), group_size)
        played = [Group(episodes[at].task, episodes[at : at + group_size]) for at in starts]
        # Make the batch: select the groups with different returns, and turn them into tensors.
        batch = prepare(algorithm, played, context)
        # Update: advantages, loss, one optimiser step.
        metrics = learner.update(batch, algorithm, context) if len(batch.lengths) else {}
        # Refresh: the engine shares the weights, and must forget what it computed with the old ones.
        engine.refresh(step + 1)
        # Log.
        rates.append(sum(episode.success for episode in episodes) / len(episodes))
        entropy = metrics.get("learner/entropy/token", float("nan"))
        print(f"step {step + 1:2}: success {rates[-1]:.2f}, entropy {entropy:.2f} nats")
    return rates


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
