"""Measure how sure a policy becomes of the expert's last action, turn by turn (conditional entropy)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from agentrl.data.trajectory import Episode, Turn
from agentrl.env.containment import open_env
from agentrl.env.registry import Factory, make
from agentrl.errors import CheckpointError, ConfigError
from agentrl.evaluation.diagnostics.findings import FOLDER, write_findings
from agentrl.evaluation.diagnostics.information import align, entropy_reduction
from agentrl.evaluation.diagnostics.stored import panel_episodes, trained_policy
from agentrl.evaluation.diagnostics.tables import expert_entropy_findings
from agentrl.evaluation.diagnostics.teacher_forcing import prompts_of, score_texts
from agentrl.evaluation.evaluate import rollout_config
from agentrl.evaluation.panels import PanelSource, choose_panel, open_panel_environments
from agentrl.policy.context import context_length
from agentrl.rollout.collector import collect
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import DemonstrationPlayer
from agentrl.run.folder import Run, open_run
from agentrl.run.policies import Policy, open_saved
from agentrl.run.settings import RunConfig
from agentrl.run.trust import drop_caller_only_values

NAME = "expert_entropy"

_POINTS = 21  # of an aligned curve


def measure_expert_entropy(
    run: Run | str | Path, *, episodes: int = 64, checkpoint: str | None = None
) -> dict[str, Any]:
    """Measure the entropy of the expert's last action along the trained policy's episodes on the panel.

        h_k = mean over the tokens y of Y of H(policy(. | the episode before its turn k, y before))

    Y is the last action of the expert, who plays the same task under the same seed and solves it; tasks that
    it does not solve are left out. The numbers are written to RUN/diagnostics.

    Args:
        run: The run, its folder or name.
        episodes: The largest number of episodes, spread over the tasks.
        checkpoint: The name or training step of the checkpoint that scores them; None takes the trained
            policy.

    Raises:
        CheckpointError: If the run has no policy, or has not stored its episodes on the panel.
        ConfigError: If its environment has no expert, or no episode can be measured.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    config = drop_caller_only_values(opened.config)
    source = choose_panel(config, None, None, None, None, None)
    check_expert(source)
    stored = trained_policy(opened, checkpoint)
    path, known = panel_episodes(opened)
    played = spread([episode for episode in known if len(episode.turns) > 1], episodes)
    if not played:
        raise CheckpointError(f"{path}: no episode has two turns, so there is no entropy along turns")
    policy = open_saved(stored.saved, config)
    last_actions = expert_actions(policy, config, source, played)
    measured = [episode for episode in played if episode.id in last_actions]
    curves = entropy_curves(policy, measured, last_actions)
    if not curves:
        raise ConfigError(f"{source.env}: the expert solves none of the {len(played)} episodes' tasks")
    outcomes = {
        name: summarise_curves([curves[e.id] for e in measured if e.id in curves and e.success is solved])
        for name, solved in (("solved", True), ("failed", False))
    }
    numbers = {
        "run": opened.folder.resolve().name,
        "checkpoint": stored.name,
        "episodes": path.name,
        "left_out": len(played) - len(curves),
        "outcomes": outcomes,
    }
    from agentrl.evaluation.diagnostics.drawing import draw_expert_entropy

    write_findings(
        opened.folder / FOLDER, NAME, numbers, expert_entropy_findings(numbers), draw_expert_entropy
    )
    return numbers


def check_expert(source: PanelSource) -> None:
    """Refuse an environment without an expert.

    Raises:
        ConfigError: Naming the environment.
    """
    try:
        with open_env(lambda: make(source.env, split=source.split, **{**source.kwargs, "expert": True})):
            return
    except ConfigError as error:
        raise ConfigError(
            f"{source.env}: has no expert, whose last action is to be measured ({error})"
        ) from error


def spread(episodes: Sequence[Episode], most: int) -> list[Episode]:
    """Return at most that many episodes, spread evenly over their order, which is by task."""
    if len(episodes) <= most:
        return list(episodes)
    return [episodes[place * len(episodes) // most] for place in range(most)]


def expert_actions(
    policy: Policy, config: RunConfig, source: PanelSource, episodes: Sequence[Episode]
) -> dict[str, tuple[int, ...]]:
    """Return by the id of each episode the token ids of the expert's last action, if it solves the task."""
    player = DemonstrationPlayer(policy.dialogue, choices=config.rollout.constrained)
    specs = [EpisodeSpec(each.id, each.env, each.task, each.seed) for each in episodes]
    factory = Factory(source.env, split=source.split, **source.kwargs)
    rollout = rollout_config(config, source.env, None, None)
    rollout, _ = resolve_placement(factory, rollout, source.split, config.seed)
    with open_panel_environments(source.env, source.split, source.kwargs, rollout, expert=True) as games:
        found = collect(specs, player, games, max_active=rollout.max_active, max_turns=rollout.max_turns)
    return {each.id: _last(each.turns) for each in found.episodes if each.success and each.turns}


def entropy_curves(
    policy: Policy, episodes: Sequence[Episode], actions: Mapping[str, tuple[int, ...]]
) -> dict[str, list[float]]:
    """Return by the id of each episode h_0, h_1, …; those that the context does not hold are left out."""
    limit = context_length(policy.served, None)
    prompts = {each.id: prompts_of(each) for each in episodes}
    held = [name for name, own in prompts.items() if max(map(len, own)) + len(actions[name]) <= limit]
    texts = ((prompt, actions[name]) for name in held for prompt in prompts[name])
    scores = score_texts(policy.served, texts)
    return {name: [fmean(next(scores).entropies) for _ in prompts[name]] for name in held}


def summarise_curves(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return means over curves, and the mean of the aligned curves with its 95 % band, as JSON values.

    The band is the normal one, of 1.96 standard errors of the mean over episodes.
    """
    if not curves:
        names = ("first", "last", "total", "slope", "decreasing")
        return {"episodes": 0, **dict.fromkeys(names), "curve": [], "band": []}
    reductions = [entropy_reduction(curve) for curve in curves]
    aligned = np.array([align(curve, _POINTS) for curve in curves])
    mean = aligned.mean(axis=0)
    error = aligned.std(axis=0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.zeros(_POINTS)
    band = np.stack([np.maximum(mean - 1.96 * error, 0.0), mean + 1.96 * error], axis=1)
    return {
        "episodes": len(curves),
        "first": fmean(curve[0] for curve in curves),
        "last": fmean(curve[-1] for curve in curves),
        "total": fmean(each.total for each in reductions),
        "slope": fmean(each.slope for each in reductions),
        "decreasing": fmean(each.decreasing for each in reductions),
        "curve": mean.tolist(),
        "band": band.tolist(),
    }


def _last(turns: Sequence[Turn]) -> tuple[int, ...]:
    return turns[-1].action_ids
