"""Scores of the policies of a run: measure them, keep them in its folder and summarise them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agentrl.data.storage import write_episodes
from agentrl.data.trajectory import Episode
from agentrl.env.panel import Panel
from agentrl.env.settings import EnvConfig
from agentrl.evaluation.panels import data_label, open_panel_environments
from agentrl.evaluation.playing import check_instructions, play_panel
from agentrl.evaluation.scores import Evaluation, summarise
from agentrl.learn.ranks import Ranks
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import Collection
from agentrl.rollout.players import Player, scripted_player
from agentrl.run.folder import evaluated_episodes
from agentrl.run.logger import RunLogger
from agentrl.run.mixture import MixedEnvConfig
from agentrl.run.records import read_evaluations, write_evaluations
from agentrl.run.settings import RunConfig
from agentrl.run.signals import Interruption
from agentrl.run.timers import Timers

_DECODINGS = {"greedy": 0.0, "sampled": 1.0}


class RunScores:
    """Scores of a run's policies in an environment, kept in its folder so that nothing is measured twice.

    Args:
        folder: The run's folder.
        config: The run's configuration, with one environment.
        panel: The panel that every policy plays.
        player: Makes a player of the run's policy for a given temperature.
        logger: Shows progress.
        timers: Measure the time spent on evaluation.
        ranks: The ranks, each of which plays a part of the tasks.
        interruption: Holds signals back while the folder is written.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        panel: Panel,
        player: Callable[[float], Player],
        logger: RunLogger,
        timers: Timers,
        ranks: Ranks,
        interruption: Interruption,
    ) -> None:
        self._folder, self._config, self._panel, self._player = folder, config, panel, player
        env = config.only_env
        self.env, self.label = env, env.label
        self._name = env.name if isinstance(env, MixedEnvConfig) else None
        self._logger, self._timers, self._ranks, self._interruption = logger, timers, ranks, interruption

    def missing(self, name: str) -> list[str]:
        """Return the decodings of a policy that have no scores yet."""
        known = self._ranks.run_on_rank0(self.results).get(name, {})
        wanted = {"random": ("sampled",), "expert": ("greedy",)}.get(name, tuple(_DECODINGS))
        return [decoding for decoding in wanted if decoding not in known]

    def measure(self, name: str, decoding: str) -> Evaluation:
        """Play the panel, and return and keep the scores.

        Args:
            name: `random`, `expert`, or the name under which to keep the scores of the run's current policy.
            decoding: `greedy` or `sampled`.
        """
        repeats = self._config.evaluation.repeats
        with self._timers.running("evaluation"):
            played, label = self._ranks.raise_on_any_rank(partial(self._play, name, decoding))
            of_task = [played.episodes[at : at + repeats] for at in range(0, len(played.episodes), repeats)]
            episodes = [episode for plays in self._ranks.merge(of_task) for episode in plays]
        found = summarise(episodes, self._panel, repeats, data=label)
        found = replace(found, retried=sum(self._ranks.gather(len(played.failures))))
        if self._ranks.first:
            write_episodes(evaluated_episodes(self._folder, name, decoding, self._name), episodes)
            results = self.results()
            results.setdefault(name, {})[decoding] = found.to_dict()
            self._save(results)
        return found

    def check_instructions(self) -> None:
        """Run the instruction check once, if it is configured and the environment has other goals."""
        results = self.results()
        if not self._config.evaluation.instruction_check or "instruction_check" in results:
            return
        with (
            self._timers.running("evaluation"),
            self._logger.stage(f"instruction check{self._where}"),
            self._environments() as environments,
        ):
            for decoding, temperature in _DECODINGS.items():
                found = check_instructions(
                    self._panel,
                    self._player(temperature),
                    environments,
                    self._config.rollout,
                    seed=self._config.seed,
                )
                if found is not None:
                    results.setdefault("instruction_check", {})[decoding] = found.to_dict()
        self._save(results)

    def results(self) -> dict[str, Any]:
        """Return the scores so far, by policy and decoding."""
        return read_evaluations(self._folder, self._name)

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says of the environment."""
        panel, results = self._panel, self.results()
        policies = {name: found for name, found in results.items() if name != "instruction_check"}
        repeats = self._config.evaluation.repeats
        return {
            "env": self.env.id,
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
        }

    @property
    def _where(self) -> str:
        return "" if self._name is None else f" in {self._name}"

    def _play(self, name: str, decoding: str) -> tuple[Collection, str | None]:
        """Play this rank's tasks of the panel; return the episodes and the environment's data label."""
        panel = self._panel
        tasks, hashes = (tuple(self._ranks.split(each)) for each in (panel.tasks, panel.hashes))
        own = replace(panel, tasks=tasks, hashes=hashes)
        with (
            self._logger.stage(f"evaluating {name}, {decoding}{self._where}", total=len(own.tasks)),
            self._environments(expert=name == "expert") as environments,
        ):
            scripted = name in ("random", "expert")
            player = scripted_player(name) if scripted else self._player(_DECODINGS[decoding])
            finished: list[Episode] = []

            def count(episode: Episode) -> None:
                finished.append(episode)
                self._logger.advance(len({episode.task for episode in finished}))

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

    def _save(self, results: dict[str, Any]) -> None:
        with self._interruption.shield():
            write_evaluations(self._folder, results, self._name)
            self._timers.save()


def run_summary(scores: Sequence[RunScores], config: RunConfig, times: Mapping[str, float]) -> dict[str, Any]:
    """Return the content of summary.json; several environments have results of their own in `environments`.

    Args:
        scores: The scores in each environment.
        config: The configuration of the run.
        times: The seconds of each activity.
    """
    found = [each.summary() for each in scores]
    results = {"environments": {each.label: own for each, own in zip(scores, found, strict=True)}}
    first = (
        found[0] if isinstance(config.env, EnvConfig) else {"env": config.describe_environments(), **results}
    )
    return {
        "env": first.pop("env"),
        "algorithm": config.algorithm.name,
        **first,
        "seeds": {"run": config.seed},
        "steps": {"warm_start": config.warm_start.steps, "train": config.trainer.steps},
        "times": dict(times),
    }
