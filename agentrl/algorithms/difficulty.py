"""Difficulty of a task, from the successes of its group, and the reward for exploring accordingly (ARES)."""

import math
from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode


class Difficulty(NamedTuple):
    """Level of difficulty, with the shape of its reward.

    Args:
        name: Its name in the log.
        least: The lowest rate of success of the group.
        margin: The part of the target by which a count may miss it.
        bend: The excess above which the penalty is linear.
        width: The width of the sigmoid of the bonus.
        cap: The highest change, in units of `strength`.
        consolation: The part of the bonus that an episode that failed gets.
    """

    name: str
    least: float
    margin: float
    bend: float
    width: float
    cap: float
    consolation: float


EASY = Difficulty("easy", 2 / 3, 0.15, 2.0, 2.0, 1.0, 0.6)
MEDIUM = Difficulty("medium", 1 / 3, 0.25, 3.0, 2.5, 1.0, 0.8)
HARD = Difficulty("hard", 0.0, 0.35, 4.0, 3.0, 1.2, 1.0)
LEVELS = (EASY, MEDIUM, HARD)


def difficulty_of(episodes: Iterable[Episode]) -> Difficulty:
    """Return the difficulty of a group by its rate of success."""
    rate = fmean([float(episode.success) for episode in episodes])
    return next(level for level in LEVELS if rate >= level.least)


def levels_of(batch: Batch) -> list[int]:
    """Return the index of the difficulty of each episode's group."""
    groups = batch.groups.tolist()
    members: dict[int, list[Episode]] = {}
    for group, episode in zip(groups, batch.episodes, strict=True):
        members.setdefault(group, []).append(episode)
    index = {group: LEVELS.index(difficulty_of(found)) for group, found in members.items()}
    return [index[group] for group in groups]


def shaping(level: Difficulty, count: int, target: float, strength: float, *, success: bool) -> float:
    """Return the change of the reward, as `ARES` says."""
    cap, margin, distance = strength * level.cap, max(1.0, level.margin * target), count - target

    def penalty(excess: float) -> float:
        over = max(0.0, excess - margin)
        bent = over * over / (2 * level.bend) if over <= level.bend else over - level.bend / 2
        return cap * min(1.0, bent / (margin + level.bend))

    def bonus(excess: float) -> float:
        return cap / (1 + math.exp(-min(excess, 500 * level.width) / level.width))

    if not success:
        return level.consolation * bonus(max(0.0, distance - margin))
    if level is HARD:
        return bonus(distance + margin) if distance >= -margin else -penalty(-distance) / 2
    return -penalty(distance if level is EASY else abs(distance))
