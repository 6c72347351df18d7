"""The episodes of a training step: their tasks, their rounds and their branches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.hooks import (
    Context,
    EndThoughts,
    ReplyState,
    ReplyTemperature,
    SampledReply,
    TokenTemperature,
    requirements,
)
from agentrl.data.trajectory import Episode, Group
from agentrl.errors import RequirementError
from agentrl.policy.engine import Engine, SamplingParams
from agentrl.rollout.branching import BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.play import ActionRequest, Collection, EpisodeSpec, Gate, Reply
from agentrl.rollout.players import ChooseSampling, Player
from agentrl.run.settings import RunConfig
from agentrl.run.tasks import task_order
from agentrl.run.timers import Timers
from agentrl.seeds import derive_seed
from agentrl.training.setup import Session


@dataclass
class RolloutResult:
    """The episodes that a training step played.

    Args:
        groups: The groups, one per task, in the order played.
        kept: The groups that are learned from.
        failures: The attempts that were aborted and made again.
        rounds: How often tasks were drawn.
        cut_observations: How many observations were too long for the policy, and are cut.
        branches: How many episodes began in the middle of another, by the way they got there.
        environment_seconds: The time spent in environments, or waiting for them, on this rank.
        player_seconds: The time spent in the player, or waiting for it, on this rank.
    """

    groups: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    failures: list[Episode] = field(default_factory=list)
    rounds: int = 0
    cut_observations: int = 0
    branches: Counter[str] = field(default_factory=Counter)
    environment_seconds: float = 0.0
    player_seconds: float = 0.0

    @property
    def episodes(self) -> list[Episode]:
        """Return the episodes of all groups."""
        return [episode for group in self.groups for episode in group.episodes]

    def metrics(self) -> dict[str, float]:
        """Return the counts of the step, to be logged."""
        return {
            "rollout/groups_kept": len(self.kept) / len(self.groups),
            "rollout/retried": float(len(self.failures)),
            "rollout/rounds": float(self.rounds),
            "rollout/cut_observations": float(self.cut_observations),
        } | {f"rollout/branches/{how}": float(count) for how, count in sorted(self.branches.items())}


class Rollouts:
    """Player of the episodes that the algorithm asks for.

    Each rank plays a part of the groups of a step, and learns from all of them.

    Args:
        session: What the run works with.
        timers: Measure where the time of a rollout goes.
    """

    def __init__(self, session: Session, timers: Timers) -> None:
        self._session, self._timers = session, timers
        self._config, self._algorithm, self._ranks = session.config, session.algorithm, session.rollout_ranks
        self._order = task_order(session.tasks, derive_seed(self._config.seed, "train"))
        block = self._config.rollout
        self.quarantine = Quarantine(block.max_attempts)
        self._collect = partial(
            collect,
            environments=session.environments,
            max_active=block.max_active,
            max_turns=block.max_turns,
            max_attempts=block.max_attempts,
            max_aborted_share=block.max_aborted_share,
            quarantine=self.quarantine,
        )

    @property
    def group_size(self) -> int:
        """Return the number of episodes of each task."""
        return self._algorithm.rollout.episodes or self._config.rollout.group_size

    def temperature(self, context: Context) -> float:
        """Return the sampling temperature of a step."""
        schedule = self._algorithm.rollout.temperature
        temperature = self._config.rollout.temperature if schedule is None else schedule(context)
        self._config.check_temperature("the temperature of the step", temperature)
        return temperature

    def play(self, engine: Engine, cursor: int, context: Context) -> RolloutResult:
        """Play the groups of a step, in as many rounds as the plan allows and `select` makes necessary.

        The random draws of environments depend on (seed, step, group), those of replies also on the episode's
        id.

        Args:
            engine: The engine that generates the replies.
            cursor: The number of tasks drawn in the steps before.
            context: The context of the step.
        """
        wanted, most = self._config.rollout.groups_per_step, self._algorithm.rollout.rounds
        hook = self._algorithm.rollout.reply_temperature
        choose = None if hook is None else partial(reply_sampling, hook, context, self._config)
        if self._algorithm.rollout.confidence:
            choose = partial(watched_sampling, self._algorithm.rollout, context, choose)
        player = self._session.policy.player(engine, self._config, self.temperature(context), choose)
        played = RolloutResult()
        with self._timers.running("rollout"):
            while not played.rounds or (played.rounds < most and len(played.kept) < wanted):
                groups = self._round(played, player, cursor, context)
                played.rounds += 1
                kept = list(self._algorithm.select(groups, context))
                short = len(played.kept) + len(kept) < wanted
                # With several rounds allowed, the last one fills up with what it has.
                played.kept += groups if short and most > 1 and played.rounds == most else kept
        played.cut_observations = sum(self._ranks.gather(player.cut_observations))
        self._timers.add("rollout.environment.wall", played.environment_seconds)
        self._timers.add("rollout.generation.wall", played.player_seconds)
        played.kept = played.kept[:wanted]
        return played

    def _round(self, played: RolloutResult, player: Player, cursor: int, context: Context) -> list[Group]:
        count, done = self._config.rollout.groups_per_step, len(played.groups)
        tasks = {index: self._order[cursor + index] for index in range(done, done + count)}
        templates = [
            EpisodeSpec(
                f"train-{context.step}-{index}",
                self._config.environment_of(task).id,
                task,
                derive_seed(self._config.seed, "rollout", context.step, index),  # one start for a group
            )
            for index, task in tasks.items()
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
        gate = gate_of(self._algorithm.rollout, context)
        if branch_policy is None:
            specs = [
                replace(item, id=f"{item.id}-{member}", member=member)
                for item in templates
                for member in range(size)
            ]
            collection = self._collect(specs, player, gate=gate)
            members = [collection.episodes[start : start + size] for start in range(0, len(specs), size)]
            return [Group(item.task, each) for item, each in zip(templates, members, strict=True)], collection
        policies = [branch_policy(size, item.seed, context) for item in templates]
        scheduler = BranchScheduler(templates, policies, size)
        collection = self._collect((), player, scheduler=scheduler, gate=gate)
        return scheduler.groups(collection), collection


def reply_sampling(
    hook: ReplyTemperature,
    context: Context,
    config: RunConfig,
    request: ActionRequest,
    sampling: SamplingParams,
) -> SamplingParams:
    """Return how a reply is sampled: `sampling` at the temperature that the algorithm wants for it.

    Raises:
        ConfigError: The engine cannot sample at the temperature.
        RequirementError: The engine cannot change it within a reply.
    """
    wanted, following = hook(state_of(request, sampling.temperature), context), None
    if isinstance(wanted, TokenTemperature):
        if "rollout:token_temperature" not in requirements(hook):
            raise RequirementError(
                "the algorithm's reply_temperature returned a TokenTemperature; mark it with "
                "@requires('rollout:token_temperature')"
            )
        following, wanted = wanted.following, wanted.first
    config.check_temperature(f"the temperature of {request.episode_id}, turn {request.turn}", wanted)
    return replace(sampling, temperature=wanted, next_temperature=following)


def watched_sampling(
    plan: RolloutPlan,
    context: Context,
    choose: ChooseSampling | None,
    request: ActionRequest,
    sampling: SamplingParams,
) -> SamplingParams:
    """Return how a reply is sampled, with the confidences and the end of reasoning that a plan asks for."""
    ends = None if plan.end_thoughts is None else partial(_ends, plan.end_thoughts, context)
    chosen = sampling if choose is None else choose(request, sampling)
    return replace(chosen, confidence=plan.confidence, end_thoughts=ends)


def _ends(
    hook: EndThoughts, context: Context, entropies: Sequence[float], confidences: Sequence[float]
) -> bool:
    return hook(entropies, confidences, context)


def gate_of(plan: RolloutPlan, context: Context) -> Gate | None:
    """Return the gate of a plan's turns; None if it lets all of them pass."""
    hook = plan.turn_gate
    if hook is None:
        return None

    def judge(request: ActionRequest, reply: Reply) -> tuple[bool, float]:
        read = [place for place, own in enumerate(reply.decided) if own and reply.trainable]
        sampled = SampledReply(
            [reply.entropies[place] for place in read], [reply.confidences[place] for place in read]
        )
        verdict = hook(state_of(request, reply.temperature or 0.0), sampled, context)
        return verdict.accept, verdict.score

    return Gate(judge, plan.resamples)


def state_of(request: ActionRequest, temperature: float) -> ReplyState:
    """Return the state of an episode before a reply, as hooks see it."""
    return ReplyState(
        request.task, request.episode_id, request.member, request.turn, request.previous, temperature
    )
