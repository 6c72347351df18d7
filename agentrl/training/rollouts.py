"""The episodes of a training step: which tasks, how many rounds of them, and who branches off whom."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import gcd

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.data.trajectory import Episode, Group
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.rollout.branching import BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.play import Collection, EpisodeSpec
from agentrl.rollout.players import Player
from agentrl.run.settings import RunConfig
from agentrl.seeds import derive_seed


class TaskOrder:
    """Every task once per epoch, in an order of the seed's, without a list of them."""

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        self._tasks, self._seed = tasks, seed

    def __getitem__(self, cursor: int) -> str:
        size = len(self._tasks)
        epoch, place = divmod(cursor, size)
        stride = derive_seed(self._seed, "stride", epoch) % size
        while gcd(stride, size) != 1:
            stride += 1
        return self._tasks[(derive_seed(self._seed, "offset", epoch) + place * stride) % size]


@dataclass
class RolloutResult:
    """What a training step played.

    Args:
        groups: one per task, in the order played.
        kept: those that are learned from.
        failures: attempts that were aborted and made again.
        rounds: times that tasks were drawn.
        branches: episodes that began in the middle of another, by how they got there.
        environment_seconds: spent in environments, or waiting for them; on this rank.
        player_seconds: the same of the player.
    """

    groups: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    failures: list[Episode] = field(default_factory=list)
    rounds: int = 0
    branches: Counter[str] = field(default_factory=Counter)
    environment_seconds: float = 0.0
    player_seconds: float = 0.0

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group.episodes]

    def metrics(self) -> dict[str, float]:
        """Counts of the step, to be logged."""
        return {
            "rollout/groups_kept": len(self.kept) / len(self.groups),
            "rollout/retried": float(len(self.failures)),
            "rollout/rounds": float(self.rounds),
        } | {f"rollout/branches/{how}": float(count) for how, count in sorted(self.branches.items())}


class Rollouts:
    """Plays what an algorithm asks for.

    Args:
        config: of the run.
        algorithm: its `rollout` plan and `select`.
        tasks: of training.
        environments: to play in.
        ranks: that play a part of the groups each, and learn from all of them.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        tasks: Sequence[str],
        environments: Environments,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config, self._algorithm, self._environments = config, algorithm, environments
        self._ranks = ranks
        self._order = TaskOrder(tasks, derive_seed(config.seed, "train"))
        self.quarantine = Quarantine(config.rollout.max_attempts)

    @property
    def group_size(self) -> int:
        """Episodes of each task."""
        return self._algorithm.rollout.episodes or self._config.rollout.group_size

    def temperature(self, context: Context) -> float:
        """That replies of the step are drawn at."""
        schedule = self._algorithm.rollout.temperature
        return self._config.rollout.temperature if schedule is None else schedule(context)

    def play(self, player: Player, cursor: int, context: Context) -> RolloutResult:
        """Play a step's groups, in as many rounds as the plan allows and `select` makes necessary.

        Environments draw from (seed, step, group), replies also from the episode's id.

        Args:
            player: who replies.
            cursor: how many tasks were drawn in the steps before.
            context: of the step.
        """
        wanted, most = self._config.rollout.groups_per_step, self._algorithm.rollout.rounds
        played = RolloutResult()
        while not played.rounds or (played.rounds < most and len(played.kept) < wanted):
            groups = self._round(played, player, cursor, context)
            played.rounds += 1
            short = len(played.kept) + len(kept := list(self._algorithm.select(groups, context))) < wanted
            # With several rounds allowed, the last one fills up with what it has.
            played.kept += groups if short and most > 1 and played.rounds == most else kept
        played.kept = played.kept[:wanted]
        return played

    def _round(self, played: RolloutResult, player: Player, cursor: int, context: Context) -> list[Group]:
        count, done = self._config.rollout.groups_per_step, len(played.groups)
        templates = [
            EpisodeSpec(
                f"train-{context.step}-{index}",
                self._config.env.id,
                self._order[cursor + index],
                derive_seed(self._config.seed, "rollout", context.step, index),  # one start for a group
            )
            for index in range(done, done + count)
        ]
        own = self._ranks.split(templates)
        dealt, collection = self._ranks.raise_on_any_rank(lambda: self._groups(own, player, context))
        groups = self._ranks.merge(dealt)
        for failures, branches in self._ranks.gather((collection.failures, collection.branches)):
            played.failures += failures
            played.branches.update(branches if self._algorithm.rollout.branch_policy is not None else {})
        for excluded in self._ranks.gather(self.quarantine.tasks):
            self.quarantine.tasks.update(excluded)
        played.groups += groups
        played.environment_seconds += collection.environment_seconds
        played.player_seconds += collection.player_seconds
        return groups

    def _groups(
        self, templates: Sequence[EpisodeSpec], player: Player, context: Context
    ) -> tuple[list[Group], Collection]:
        branch_policy, size = self._algorithm.rollout.branch_policy, self.group_size
        if branch_policy is None:
            specs = [replace(item, id=f"{item.id}-{member}") for item in templates for member in range(size)]
            collection = self._collect(specs, player)
            members = [collection.episodes[start : start + size] for start in range(0, len(specs), size)]
            return [Group(item.task, each) for item, each in zip(templates, members, strict=True)], collection
        policies = [branch_policy(size, item.seed, context) for item in templates]
        scheduler = BranchScheduler(templates, policies, size)
        collection = self._collect((), player, scheduler)
        return scheduler.groups(collection), collection

    def _collect(
        self, specs: Sequence[EpisodeSpec], player: Player, scheduler: BranchScheduler | None = None
    ) -> Collection:
        block = self._config.rollout
        return collect(
            specs,
            player,
            self._environments,
            max_active=block.max_active,
            max_turns=block.max_turns,
            max_attempts=block.max_attempts,
            max_aborted_share=block.max_aborted_share,
            quarantine=self.quarantine,
            scheduler=scheduler,
        )
