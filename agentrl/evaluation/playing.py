"""Play the tasks of a panel, each a fixed number of times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from agentrl.data.trajectory import Episode
from agentrl.env.panel import Panel
from agentrl.evaluation.scores import InstructionCheck, summarise_instruction_check
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.play import Collection, EpisodeSpec
from agentrl.rollout.players import Player
from agentrl.rollout.settings import RolloutConfig
from agentrl.seeds import derive_seed

OnEpisode = Callable[[Episode], None]


def play_panel(
    panel: Panel,
    player: Player,
    environments: Environments,
    rollout: RolloutConfig | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
    played: Mapping[str, Episode] | None = None,
) -> Collection:
    """Play each task of the panel exactly `repeats` times.

    Every random draw depends on the seed, the task and the repeat alone.

    Args:
        panel: The panel of tasks.
        player: The player that is evaluated.
        environments: The environments of the panel.
        rollout: The concurrency, the limits and the number of attempts; None takes the defaults.
        repeats: The number of episodes per task.
        seed: The seed of the environments and the player.
        on_episode: Called with each episode when it ends.
        played: Episodes by id that an interrupted evaluation has left, which are not played again.

    Returns:
        The episodes, task by task in the panel's order, and the failed attempts.
    """
    specs, played = _specs(panel.env, panel.tasks, repeats, seed), played or {}
    missing = [spec for spec in specs if spec.id not in played]
    found = _play(missing, player, environments, rollout, on_episode)
    episodes = {**played, **{episode.id: episode for episode in found.episodes}}
    return replace(found, episodes=tuple(episodes[spec.id] for spec in specs))


def episode_ids(panel: Panel, repeats: int, seed: int) -> list[str]:
    """Return the ids of the episodes that `play_panel` plays, in its order."""
    return [spec.id for spec in _specs(panel.env, panel.tasks, repeats, seed)]


def usage_of(player: Player, before: Mapping[str, int] | None = None) -> dict[str, int] | None:
    """Return the requests and tokens of a player on a server, without those `before`; None for others."""
    usage: Mapping[str, int] | None = getattr(player, "usage", None)
    if usage is None:
        return None
    return {name: count - (before or {}).get(name, 0) for name, count in usage.items()}


def check_instructions(
    panel: Panel,
    player: Player,
    environments: Environments,
    rollout: RolloutConfig | None = None,
    *,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
) -> InstructionCheck | None:
    """Play, for each task of the panel, a task with the same initial state and another goal.

    The environment names that task (`unwrapped.other_goal(task)`, or None) and reports in
    `info["other_success"]` whether the goal of the panel's task was reached as well.

    Args:
        panel: The panel of tasks.
        player: The player that is evaluated.
        environments: The environments of the panel.
        rollout: The concurrency, the limits and the number of attempts; None takes the defaults.
        seed: The seed of the environments and the player.
        on_episode: Called with each episode when it ends.

    Returns:
        How often each of the two goals was reached; None if the environment has no other goals.
    """
    with environments.borrow() as environment:
        other_goal = getattr(environment.unwrapped, "other_goal", lambda task: None)
        others = [other for task in panel.tasks if (other := other_goal(task)) is not None]
    if not others:
        return None
    # Several tasks may name the same other task, which is played once.
    specs = _specs(panel.env, tuple(dict.fromkeys(others)), 1, derive_seed(seed, "instruction"))
    played = _play(specs, player, environments, rollout, on_episode)
    return summarise_instruction_check(played.episodes)


def _play(
    specs: Sequence[EpisodeSpec],
    player: Player,
    environments: Environments,
    rollout: RolloutConfig | None,
    on_episode: OnEpisode | None,
) -> Collection:
    block = rollout or RolloutConfig()
    return collect(
        specs,
        player,
        environments,
        max_active=block.max_active,
        max_turns=block.max_turns,
        max_attempts=block.max_attempts,
        # Only a player whose server may fail for good sets a limit.
        max_aborted_share=getattr(player, "max_aborted_share", 1.0),
        quarantine=Quarantine(block.max_attempts),
        on_episode=on_episode,
    )


def _specs(env: str, tasks: Sequence[str], repeats: int, seed: int) -> list[EpisodeSpec]:
    return [
        EpisodeSpec(
            f"evaluation-{seed}-{task}-{repeat}", env, task, derive_seed(seed, "evaluation", task, repeat)
        )
        for task in tasks
        for repeat in range(repeats)
    ]
