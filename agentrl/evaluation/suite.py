"""Evaluate policies on several panels: one table, a row for each panel; an evaluation can be interrupted."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import agentrl
from agentrl.config import to_tree
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.evaluation.evaluate import (
    check_options,
    player_config,
    policy_name,
    rollout_config,
    settings_of_model,
)
from agentrl.evaluation.fingerprint import (
    SCRIPTED,
    check_alike,
    panel_fingerprint,
    policy_fingerprint,
    wording_hash,
)
from agentrl.evaluation.output import EvaluationFolder
from agentrl.evaluation.panel_lists import (
    OpenedPanel,
    PanelEntry,
    choose_panels,
    lists_panels,
    open_panels,
)
from agentrl.evaluation.panels_table import panel_notes, results_markdown
from agentrl.evaluation.playing import OnEpisode, episode_ids
from agentrl.evaluation.scores import summarise
from agentrl.evaluation.several import PanelScore, play_one_of_several
from agentrl.policy.settings import ENDPOINT
from agentrl.rollout.players import Player
from agentrl.rollout.settings import Placement, RolloutConfig
from agentrl.run.folder import Run
from agentrl.run.policies import open_player
from agentrl.run.settings import RunConfig

OnPanel = Callable[[str, str, Sequence[Episode]], None]  # policy, label of the panel, all of its episodes


@dataclass(frozen=True)
class Results:
    """Scores of policies on several panels.

    Args:
        scores: By policy, the score on each panel.
        panels: The panels.
        decoding: `sampled` or `greedy`.
        repeats: The number of episodes per task.
        seed: The seed of the environments and of the policies' sampling.
    """

    scores: Mapping[str, tuple[PanelScore, ...]]
    panels: tuple[OpenedPanel, ...]
    decoding: str
    repeats: int
    seed: int

    @property
    def title(self) -> str:
        """Return a line that says how all of it was measured."""
        plays = "1 episode" if self.repeats == 1 else f"{self.repeats} episodes"
        return f"{self.decoding}, {plays} per task, seed {self.seed}, 95 % intervals"

    @property
    def notes(self) -> list[str]:
        """Return lines about the panels and about aborted episodes."""
        return panel_notes(self.panels, self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: for each policy and panel the scores with their fingerprint, or the reason."""
        return {
            "agentrl": agentrl.__version__,
            "decoding": self.decoding,
            "repeats": self.repeats,
            "seed": self.seed,
            "policies": {
                name: {score.label: score.to_dict() for score in found} for name, found in self.scores.items()
            },
        }

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        return results_markdown(self.scores, self.title, self.notes)


@dataclass(frozen=True)
class _Entrant:
    """A policy that takes part: its configuration, and what is known of it before it plays."""

    name: str
    config: RunConfig
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class _Options:
    repeats: int
    seed: int
    temperature: float
    placement: Placement | None
    interpreter: str | None
    config: str | Path | None
    overrides: Sequence[str]
    base_url: str | None
    on_episode: OnEpisode | None
    on_panel: OnPanel | None

    def rollout(self, config: RunConfig, env: str) -> RolloutConfig:
        return rollout_config(config, env, self.placement, self.interpreter)


def evaluate_panels(
    policies: Sequence[Run | str | Path],
    panels: Sequence[PanelEntry | str | Path] = (),
    *,
    suite: str | Path | None = None,
    envs: Sequence[str] = (),
    split: str | None = None,
    tasks: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    placement: Placement | None = None,
    interpreter: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    base_url: str | None = None,
    output: str | Path | None = None,
    on_episode: OnEpisode | None = None,
    on_panel: OnPanel | None = None,
) -> Results:
    """Evaluate policies on several panels, each policy on each panel as if it were alone.

    A panel that cannot be played, as for want of a package, costs its own scores alone. Without `panels`,
    `suite` and `envs`, the panels are those of `evaluation.panels` of the first policy that is a run, or of
    `config`, else its one panel.

    Args:
        policies: Policies as `evaluate` takes them, the first model or run also for what `random` and
            `expert` leave open.
        panels: Panels, their files, or descriptions of them.
        suite: The name of a shipped suite, or its file.
        envs: The ids of environments, of which the first tasks of the held-out split are played.
        split: Another split of `envs`.
        tasks: The number of tasks of each panel; of a panel that lists its tasks, the first ones.
        env_kwargs: Arguments of the environment, if `envs` is a single one.
        repeats: The number of episodes per task.
        seed: The seed of the environments and of the policies' sampling.
        temperature: The sampling temperature; 0 is greedy.
        placement: Where the environments run on this machine, see `evaluate`.
        interpreter: Another Python interpreter to run the environments in.
        config: A configuration file for policies that are no runs.
        overrides: `key=value` for keys of the configuration to play with.
        base_url: The address of the chat server of policies `openai:MODEL`.
        output: A folder for the episodes as they end and for the results. If it holds an interrupted
            evaluation with the same settings, that goes on; its aborted episodes are played again.
        on_episode: Called with each episode when it ends.
        on_panel: Called with the policy, the label of the panel and its episodes when a panel is complete,
            also with those of an interrupted evaluation that are not played again.

    Raises:
        ConfigError: If arguments are unknown or contradict each other, or policies were not to be measured
            alike, see `check_alike`.
        PanelError: If a panel's tasks are no longer what they were when it was made.
        CheckpointError: If there is no such policy.
    """
    check_options(repeats, placement)
    if tasks is not None and tasks < 1:
        raise ConfigError(f"tasks is {tasks}, wanted at least 1")
    names = [policy_name(policy) for policy in policies]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"policies are {', '.join(names) or 'none'}; wanted at least one, each once")
    if base_url is not None and not any(name.startswith(ENDPOINT) for name in names):
        raise ConfigError(f"--base-url is for a policy {ENDPOINT}MODEL, not for {', '.join(names)}")
    options = _Options(
        repeats,
        seed,
        temperature,
        placement,
        interpreter,
        config,
        overrides,
        base_url,
        on_episode,
        on_panel,
    )
    entrants = _entrants(names, options)
    leading = next((each for each in entrants if each.name not in SCRIPTED), entrants[0])
    if not (panels or suite or envs or split):
        lists_panels(leading.name, config, overrides)
    entries = choose_panels(
        leading.config, panels, suite=suite, envs=envs, split=split, tasks=tasks, env_kwargs=env_kwargs
    )
    check_alike({each.name: {**each.fingerprint, **_max_turns(each)} for each in entrants})
    request = _request(entrants, entries, options)
    folder = None if output is None else EvaluationFolder(Path(output), request)
    with nullcontext() if folder is None else folder:
        opened = open_panels(
            entries, leading.config, partial(options.rollout, leading.config), tolerant=suite is not None
        )
        if folder is not None:
            folder.note({f"panel {each.label}": each.panel.hash for each in opened if each.panel is not None})
        scores = {each.name: _play(each, opened, options, folder) for each in entrants}
        results = Results(scores, opened, "sampled" if temperature else "greedy", repeats, seed)
        if folder is not None:
            folder.write_results(results.to_dict(), results.to_markdown())
    return results


def _entrants(names: Sequence[str], options: _Options) -> list[_Entrant]:
    """Read the configuration of each policy; scripted ones play like the first that is not."""
    configs = {
        name: player_config(name, options.config, options.overrides) for name in names if name not in SCRIPTED
    }
    first = next(iter(configs.values()), None) or player_config(names[0], options.config, options.overrides)
    return [
        _Entrant(name, known, policy_fingerprint(name, known, options.temperature, options.seed))
        for name in names
        for known in [configs.get(name, first)]
    ]


def _max_turns(entrant: _Entrant) -> dict[str, Any]:
    return {"panel": {"max_turns": entrant.config.rollout.max_turns}}


def _request(
    entrants: Sequence[_Entrant], entries: Sequence[PanelEntry], options: _Options
) -> dict[str, Any]:
    """Return what an evaluation is asked for, as JSON values."""
    panels = {f"panel {index}": to_tree(entry) for index, entry in enumerate(entries, start=1)}
    policies = {each.name: {**each.fingerprint, **_max_turns(each)} for each in entrants}
    return {"repeats": options.repeats, "seed": options.seed, **panels, **policies}


def _play(
    entrant: _Entrant, panels: Sequence[OpenedPanel], options: _Options, folder: EvaluationFolder | None
) -> tuple[PanelScore, ...]:
    """Play each panel; the policy is opened for the first one with episodes to play."""
    player: Player | None = None
    scores = []
    for opened in panels:
        if opened.panel is None:
            scores.append(PanelScore(opened.label, opened.env, error=opened.error))
            continue
        played = {} if folder is None else folder.played(entrant.name, opened.label)
        ids = episode_ids(opened.panel, options.repeats, options.seed)
        if all(name in played for name in ids):
            episodes = [played[name] for name in ids]
            found = summarise(episodes, opened.panel, options.repeats, data=opened.data)
            score = PanelScore(opened.label, opened.env, found)
            if options.on_panel is not None:
                options.on_panel(entrant.name, opened.label, episodes)
        else:
            if player is None:
                player = _open(entrant, options)
                if folder is not None:
                    folder.note({_prompts(entrant): wording_hash(player)})
            score = _play_panel(entrant, player, opened, options, folder, played)
        wording = wording_hash(player) if folder is None else folder.found.get(_prompts(entrant), {})
        scores.append(_with_fingerprint(score, entrant, opened, options, wording))
    return tuple(scores)


def _open(entrant: _Entrant, options: _Options) -> Player:
    """Open the player of a policy."""
    given = entrant.config if entrant.name in SCRIPTED else None
    if given is None and options.config is not None:
        given = settings_of_model(entrant.name, options.config, options.overrides)
    player, _ = open_player(
        entrant.name,
        temperature=options.temperature,
        config=given,
        overrides=options.overrides,
        base_url=options.base_url if entrant.name.startswith(ENDPOINT) else None,
    )
    return player


def _play_panel(
    entrant: _Entrant,
    player: Player,
    opened: OpenedPanel,
    options: _Options,
    folder: EvaluationFolder | None,
    played: Mapping[str, Episode],
) -> PanelScore:
    """Play what is missing of a panel, and keep the episodes in the folder as they end."""
    assert opened.panel is not None
    ended = dict(played)
    with nullcontext() if folder is None else folder.recording(entrant.name, opened.label) as parts:

        def keep(episode: Episode) -> None:
            ended[episode.id] = episode
            if parts is not None:
                parts.add(episode)
            if options.on_episode is not None:
                options.on_episode(episode)

        score = play_one_of_several(
            opened,
            player,
            partial(options.rollout, entrant.config),
            expert=entrant.name == "expert",
            repeats=options.repeats,
            seed=options.seed,
            on_episode=keep,
            played=played,
        )
    if score.evaluation is not None:
        ids = episode_ids(opened.panel, options.repeats, options.seed)
        episodes = [ended[name] for name in ids]
        if folder is not None:
            folder.finish(entrant.name, opened.label, episodes)
        if options.on_panel is not None:
            options.on_panel(entrant.name, opened.label, episodes)
    return score


def _with_fingerprint(
    score: PanelScore,
    entrant: _Entrant,
    opened: OpenedPanel,
    options: _Options,
    wording: Mapping[str, Any],
) -> PanelScore:
    """Add to the scores what they were measured with."""
    if score.evaluation is None or opened.panel is None:
        return score
    known, max_turns = entrant.fingerprint, entrant.config.rollout.max_turns
    full = {
        **known,
        **({"prompt": {**known["prompt"], **wording}} if "prompt" in known else {}),
        **panel_fingerprint(opened.panel, opened.data, options.repeats, max_turns),
    }
    checkpoint = known["policy"].get("checkpoint")
    return replace(score, evaluation=replace(score.evaluation, fingerprint=full, checkpoint=checkpoint))


def _prompts(entrant: _Entrant) -> str:
    return f"prompts of {entrant.name}"
