"""Play several panels: each has its own results, and one that cannot be played does not stop the others."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentrl.data.trajectory import Episode
from agentrl.env.registry import Factory
from agentrl.evaluation.panel_lists import OpenedPanel, describe_failure
from agentrl.evaluation.panels import open_panel_environments
from agentrl.evaluation.playing import OnEpisode, play_panel, usage_of
from agentrl.evaluation.scores import Evaluation, summarise
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.players import Player
from agentrl.rollout.settings import RolloutConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PanelScore:
    """Scores of a policy on one of several panels, or the reason why it was not played there.

    Args:
        label: The name of the panel's row.
        env: The id of the environment.
        evaluation: The scores; None if the panel was not played.
        error: Why it was not played.
    """

    label: str
    env: str
    evaluation: Evaluation | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"evaluation": self.evaluation and self.evaluation.to_dict()}


def play_one_of_several(
    opened: OpenedPanel,
    player: Player,
    rollout: Callable[[str], RolloutConfig],
    *,
    expert: bool = False,
    repeats: int = 1,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
    played: Mapping[str, Episode] | None = None,
) -> PanelScore:
    """Play one of several panels in environments of its own; an error is the reason why it has no score.

    Args:
        opened: The panel.
        player: The player that is evaluated.
        rollout: Returns the rollout settings for the id of an environment.
        expert: Whether the player is the expert.
        repeats: The number of episodes per task.
        seed: The seed of the environments and the player.
        on_episode: Called with each episode when it ends.
        played: Episodes by id that are not played again.
    """
    panel, before = opened.panel, usage_of(player)
    if panel is None:
        return PanelScore(opened.label, opened.env, error=opened.error)
    try:
        settings = rollout(panel.env)
        factory = Factory(panel.env, split=panel.split, **panel.env_kwargs)
        settings, _ = resolve_placement(factory, settings, panel.split, seed)
        with open_panel_environments(
            panel.env, panel.split, panel.env_kwargs, settings, expert=expert
        ) as environments:
            began = time.perf_counter()
            found = play_panel(
                panel,
                player,
                environments,
                settings,
                repeats=repeats,
                seed=seed,
                on_episode=on_episode,
                played=played,
            )
            seconds = time.perf_counter() - began
    except Exception as error:
        _log.debug("panel %s cannot be played", opened.label, exc_info=True)
        return PanelScore(opened.label, opened.env, error=describe_failure(error))
    new = [episode for episode in found.episodes if episode.id not in (played or {})]
    turns = sum(len(episode.turns) for episode in (*new, *found.failures))
    scores = summarise(found.episodes, panel, repeats, data=opened.data)
    scores = replace(
        scores,
        retried=len(found.failures),
        steps_per_second=turns / seconds,
        usage=usage_of(player, before),
    )
    return PanelScore(opened.label, opened.env, scores)
