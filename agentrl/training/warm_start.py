"""The warm start: demonstrations of the expert, and behaviour cloning of them."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.cloning import cloning
from agentrl.data.batch import Batch, collate
from agentrl.data.trajectory import Episode, Group, StopReason
from agentrl.errors import ConfigError
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.policy.dialogue import Dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.players import DemonstrationPlayer
from agentrl.run.env_backend import open_training_environments
from agentrl.run.logger import RunLogger
from agentrl.run.policies import FALLBACK_MAX_TURNS, MAX_ENDLESS_EPISODES, drawn_specs, is_endless, turn_limit
from agentrl.run.settings import RunConfig
from agentrl.run.tasks import tasks_of
from agentrl.run.timers import Timers
from agentrl.seeds import derive_seed
from agentrl.training.alarms import Alarms
from agentrl.training.setup import Session
from agentrl.training.state import TrainingState

OnEpisode = Callable[[Episode], None]


def clone(
    session: Session,
    state: TrainingState,
    logger: RunLogger,
    timers: Timers,
    alarms: Alarms,
    episodes: Sequence[Episode] | None = None,
) -> None:
    """Clone demonstrations, for what is left of `warm_start.steps`.

    Args:
        session: What the run works with.
        state: Its state.
        logger: Keeps the rows.
        timers: Count the seconds.
        alarms: Warn of updates that round away.
        episodes: The demonstrations; None lets the environment's expert play them.
    """
    config, steps = session.config, session.config.warm_start.steps
    if state.step >= steps:
        return
    if episodes is None:
        episodes = _played(session, logger, timers)
    algorithm = cloning()
    with logger.stage("cloning", total=steps, done=state.step):
        for batch in cloning_batches(config, episodes, first=state.step):
            session.check_stop()
            with session.interruption.shield(), timers.running("cloning"):
                learned = state.learner.update(batch, algorithm, Context(state.step, steps, {}))
                state.step += 1
                metrics = {f"warm_start/{key}": value for key, value in learned.items()}
                logger.write({"stage": state.stage, "step": state.step} | metrics)
                alarms.check_rounding(state.stage, state.step, metrics, state.learner)
            state.save_when_due()
    state.save()


def _played(session: Session, logger: RunLogger, timers: Timers) -> list[Episode]:
    """Let the environments' experts play the demonstrations."""
    with (
        timers.running("demonstrations"),
        logger.stage("demonstrations"),
        open_training_environments(session.config, expert=True, names=session.experts) as environments,
    ):
        return demonstrations(
            session.config,
            tasks_of(session.tasks, session.experts),
            environments,
            session.policy.dialogue,
            ranks=session.ranks,
            say=logger.say,
        )


def demonstrations(
    config: RunConfig,
    tasks: Sequence[str],
    environments: Environments,
    dialogue: Dialogue,
    on_episode: OnEpisode | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] | None = None,
) -> list[Episode]:
    """Return successful episodes of the environment's expert, in a fixed order; each rank plays a part.

    Episodes that do not fit the policy's context are left out, and `say` is called with their number.

    Raises:
        ConfigError: The environment has no expert, or the expert solves too few tasks.
    """
    block = config.warm_start
    player = DemonstrationPlayer(
        dialogue,
        noise=block.noise,
        seed=derive_seed(config.seed, "noise"),
        noise_prefers=block.noise_prefers,
        choices=config.rollout.constrained,
        max_context=config.policy.max_context,
        max_tokens=config.engine.max_tokens,
    )
    specs = list(drawn_specs(config, "demonstration", block.demonstrations, tasks))
    solved_or_endless = [0, 0]

    def watch(episode: Episode) -> None:
        solved_or_endless[0] += episode.success
        solved_or_endless[1] += is_endless(config, episode)
        if solved_or_endless[0] == 0 and solved_or_endless[1] >= MAX_ENDLESS_EPISODES:
            raise ConfigError(
                f"warm_start.steps is {block.steps}, but the expert of {_names(config)} solved none of its "
                f"first tasks, and came to no end in {MAX_ENDLESS_EPISODES} of them within "
                f"{FALLBACK_MAX_TURNS} turns; if they are that long, set rollout.max_turns"
            )
        if on_episode is not None:
            on_episode(episode)

    own = ranks.raise_on_any_rank(
        lambda: (
            collect(
                ranks.split(specs),
                player,
                environments,
                max_active=environments.capacity or 1,
                max_turns=turn_limit(config),
                max_attempts=config.rollout.max_attempts,
                quarantine=Quarantine(config.rollout.max_attempts),
                on_episode=watch,
            ).episodes
        )
    )
    played = ranks.merge(own)
    solved = [episode for episode in played if episode.success]
    too_long = sum(episode.stop is StopReason.CONTEXT_LIMIT for episode in played)
    left_out = f"{too_long} did not fit policy.max_context={config.policy.max_context}"
    if len(solved) < block.batch_size:
        raise _too_few(config, played, len(solved), [left_out] * bool(too_long))
    if too_long and say is not None:
        say(f"warning: of {len(played)} demonstrations {left_out} and are left out")
    return solved


def _too_few(config: RunConfig, played: Sequence[Episode], solved: int, reasons: list[str]) -> ConfigError:
    others = Counter(
        episode.error for episode in played if episode.error and episode.stop != StopReason.CONTEXT_LIMIT
    )
    reasons = [*reasons, *(f"{count} x {error}" for error, count in others.most_common(3))]
    return ConfigError(
        f"warm_start.steps is {config.warm_start.steps}, but the expert of {_names(config)} solved {solved} "
        f"of {len(played)} tasks ({'; '.join(reasons) or 'it did not solve them'}); wanted at least "
        f"{config.warm_start.batch_size}"
    )


def _names(config: RunConfig) -> str:
    return " and of ".join(env.label for env in config.environments)


def cloning_batches(config: RunConfig, episodes: Sequence[Episode], first: int = 0) -> Iterator[Batch]:
    """Yield a batch for each step from `first` on; the order of an epoch depends only on the seed."""
    size = config.warm_start.batch_size
    per_epoch = len(episodes) // size
    order: list[int] = []
    for step in range(first, config.warm_start.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or not order:
            order = list(range(len(episodes)))
            random.Random(derive_seed(config.seed, "cloning", epoch)).shuffle(order)
        chosen = [episodes[index] for index in order[place * size : (place + 1) * size]]
        yield collate([Group(episode.task, (episode,)) for episode in chosen])
