"""The metrics of a step's episodes: success, length, and entropy per token, turn, trajectory, task type."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from agentrl.data.batch import Batch
from agentrl.data.entropies import entropies_by_level
from agentrl.data.trajectory import Episode, Outcome, StopReason
from agentrl.env.names import split_task
from agentrl.training.rollouts import RolloutResult


def step_metrics(result: RolloutResult, batch: Batch, environments: Collection[str] = ()) -> dict[str, float]:
    """Return the metrics of a step's episodes.

    Args:
        result: The episodes that were played.
        batch: The batch of those that are learned from.
        environments: The names of several environments, each of which has metrics of its own besides.
    """
    kept = {"rollout/episodes_kept": len(batch.episodes) / len(result.episodes)}
    own = [metric for name in environments for metric in _of_environment(result, name).items()]
    return rollout_metrics(result.episodes, task_types=not environments) | kept | result.metrics() | dict(own)


def _of_environment(result: RolloutResult, name: str) -> dict[str, float]:
    """Return the metrics of the episodes of one of several environments, under its name."""
    groups = [group for group in result.groups if split_task(group.task)[0] == name]
    kept = [group for group in result.kept if split_task(group.task)[0] == name]
    metrics = rollout_metrics([episode for group in groups for episode in group.episodes])
    if groups:
        metrics["rollout/groups_kept"] = len(kept) / len(groups)
    return {key.replace("rollout/", f"rollout/{name}/", 1): value for key, value in metrics.items()}


def rollout_metrics(episodes: Sequence[Episode], *, task_types: bool = True) -> dict[str, float]:
    """Return means over the episodes that were not aborted; a mean over nothing is left out.

    Entropies are in nats, over action tokens only: `entropy/token` weighs every action token alike,
    `entropy/turn` every turn, and `entropy/trajectory` every episode.

    Args:
        episodes: The episodes.
        task_types: Whether to add the metrics of each task type; several environments may share their names.
    """
    played = [episode for episode in episodes if episode.outcome is not Outcome.ABORTED]
    by_type: dict[str, list[Episode]] = defaultdict(list)
    for episode in played:
        if task_types and episode.task_type is not None:
            by_type[episode.task_type].append(episode)
    metrics = {
        "rollout/success_rate": _mean(episode.success for episode in played),
        "rollout/reward_mean": _mean(episode.episode_return for episode in played),
        "rollout/turns_mean": _mean(len(episode.turns) for episode in played),
        "rollout/invalid_rate": _mean(not turn.valid for episode in played for turn in episode.turns),
        **_entropies(played),
    }
    for name, members in sorted(by_type.items()):
        metrics[f"rollout/success_rate/{name}"] = _mean(episode.success for episode in members)
        metrics |= {f"{level}/{name}": value for level, value in _entropies(members).items()}
    counts = {
        "rollout/episodes": float(len(episodes)),
        "rollout/aborted_rate": 1 - len(played) / len(episodes) if episodes else 0.0,
        "rollout/reply_tokens": float(
            sum(len(turn.action_ids) for episode in played for turn in episode.turns)
        ),
        "rollout/action_tokens": float(
            sum(sum(turn.action_mask) for episode in played for turn in episode.turns)
        ),
    }
    stops = Counter(episode.stop for episode in episodes)
    counts |= {f"rollout/stop/{reason.value}": stops[reason] / max(1, len(episodes)) for reason in StopReason}
    return counts | {key: value for key, value in metrics.items() if value is not None}


def staleness(episodes: Sequence[Episode], version: int) -> dict[str, float]:
    """Return how many updates lie between the weights that generated a reply token and `version`."""
    updates = [
        version - drawn
        for episode in episodes
        for turn in episode.turns
        for drawn in turn.policy_versions or (turn.policy_version,) * len(turn.action_ids)
    ]
    return (
        {"rollout/staleness/mean": sum(updates) / len(updates), "rollout/staleness/max": max(updates)}
        if updates
        else {}
    )


def _entropies(episodes: Sequence[Episode]) -> dict[str, float | None]:
    levels = entropies_by_level(episodes)
    return {f"rollout/entropy/{level}": _mean(values) for level, values in levels.items()}


def _mean(values: Iterable[float]) -> float | None:
    known = [float(value) for value in values]
    return sum(known) / len(known) if known else None
