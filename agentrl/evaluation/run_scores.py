"""What the policies of a run score: on its panel, and when told another goal."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agentrl.data.storage import write_episodes
from agentrl.data.trajectory import Episode
from agentrl.env.panel import Panel
from agentrl.evaluation.evaluate import (
    Evaluation,
    data_label,
    instruction_check,
    open_panel_environments,
    play_panel,
    summarise,
)
from agentrl.files import write_atomic
from agentrl.learn.ranks import Ranks
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import Collection
from agentrl.rollout.players import Player
from agentrl.run.logger import Logbook
from agentrl.run.policies import scripted_player
from agentrl.run.records import read_evaluations
from agentrl.run.settings import RunConfig
from agentrl.run.signals import Interruption
from agentrl.run.timers import Clocks

_DECODINGS = {"greedy": 0.0, "sampled": 1.0}


class Measurements:
    """Measures policies, and keeps what was found in the run's folder; what it holds is not measured again.

    Args:
        folder: of the run.
        config: of the run.
        panel: of tasks that all policies play.
        player: makes one of the run's policy, given a temperature.
        logbook: shows progress.
        clocks: run while episodes are played.
        ranks: that play a part of the tasks each.
        interruption: held back while the folder is written.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        panel: Panel,
        player: Callable[[float], Player],
        logbook: Logbook,
        clocks: Clocks,
        ranks: Ranks,
        interruption: Interruption,
    ) -> None:
        self._folder, self._config, self._panel, self._player = folder, config, panel, player
        self._logbook, self._clocks, self._ranks, self._interruption = logbook, clocks, ranks, interruption

    def missing(self, name: str) -> list[str]:
        """Decodings of a policy that were not measured yet."""
        known = self._ranks.run_on_rank0(self.results).get(name, {})
        wanted = {"random": ("sampled",), "expert": ("greedy",)}.get(name, tuple(_DECODINGS))
        return [decoding for decoding in wanted if decoding not in known]

    def measure(self, name: str, decoding: str) -> Evaluation:
        """Play the panel with `random`, `expert`, or the run's policy as it is now, called `name`."""
        repeats = self._config.evaluation.repeats
        with self._clocks.running("evaluation"):
            played, label = self._ranks.raise_on_any_rank(partial(self._play, name, decoding))
            of_task = [played.episodes[at : at + repeats] for at in range(0, len(played.episodes), repeats)]
            episodes = [episode for plays in self._ranks.merge(of_task) for episode in plays]
        found = summarise(episodes, self._panel, repeats, data=label)
        found = replace(found, retried=sum(self._ranks.gather(len(played.failures))))
        if self._ranks.first:
            write_episodes(self._folder / "episodes" / f"{name}-{decoding}.parquet", episodes)
            results = self.results()
            results.setdefault(name, {})[decoding] = found.to_dict()
            self._keep(results)
        return found

    def check_instructions(self) -> None:
        """Tell the policy another goal of the same room, where the environment can; once per run."""
        results = self.results()
        if not self._config.evaluation.instruction_check or "instruction_check" in results:
            return
        with (
            self._clocks.running("evaluation"),
            self._logbook.stage("instruction check"),
            self._environments() as environments,
        ):
            for decoding, temperature in _DECODINGS.items():
                found = instruction_check(
                    self._panel,
                    self._player(temperature),
                    environments,
                    self._config.rollout,
                    seed=self._config.seed,
                )
                if found is not None:
                    results.setdefault("instruction_check", {})[decoding] = found.to_dict()
        self._keep(results)

    def results(self) -> dict[str, Any]:
        """What was found so far: policy, decoding, numbers."""
        return read_evaluations(self._folder)

    def summary(self) -> dict[str, Any]:
        """The whole run in one record."""
        config, panel, results = self._config, self._panel, self.results()
        policies = {name: found for name, found in results.items() if name != "instruction_check"}
        repeats = config.evaluation.repeats
        return {
            "env": config.env.id,
            "algorithm": config.algorithm.name,
            "data": next((each["data"] for found in policies.values() for each in found.values()), None),
            "policies": policies,
            "instruction_check": results.get("instruction_check"),
            "episodes_evaluated": len(panel.tasks) * repeats,
            "panel": {
                "hash": panel.hash,
                "split": panel.split,
                "tasks": len(panel.tasks),
                "repeats": repeats,
            },
            "seeds": {"run": config.seed},
            "steps": {"warm_start": config.warm_start.steps, "train": config.trainer.steps},
            "times": self._clocks.read(),
        }

    def _play(self, name: str, decoding: str) -> tuple[Collection, str | None]:
        """Play this rank's tasks of the panel; also what the tasks are, as their environment labels them."""
        panel = self._panel
        tasks, hashes = (tuple(self._ranks.split(each)) for each in (panel.tasks, panel.hashes))
        own = replace(panel, tasks=tasks, hashes=hashes)
        with (
            self._logbook.stage(f"evaluating {name}, {decoding}", total=len(own.tasks)),
            self._environments(expert=name == "expert") as environments,
        ):
            scripted = name in ("random", "expert")
            player = scripted_player(name) if scripted else self._player(_DECODINGS[decoding])
            finished: list[Episode] = []

            def count(episode: Episode) -> None:
                finished.append(episode)
                self._logbook.advance(len({episode.task for episode in finished}))

            played = play_panel(
                own,
                player,
                environments,
                self._config.rollout,
                repeats=self._config.evaluation.repeats,
                seed=self._config.seed,
                on_episode=count,
            )
            return played, data_label(environments)

    def _environments(self, *, expert: bool = False) -> Environments:
        panel = self._panel
        return open_panel_environments(
            panel.env, panel.split, panel.env_kwargs, self._config.rollout, expert=expert
        )

    def _keep(self, results: dict[str, Any]) -> None:
        with self._interruption.shield():
            write_atomic(self._folder / "evaluations.json", json.dumps(results, indent=1))
            self._clocks.save()
