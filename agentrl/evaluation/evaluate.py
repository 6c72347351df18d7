"""Measure a policy on a fixed panel of tasks, each played exactly K times."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast, get_args

import gymnasium

from agentrl.data.trajectory import Episode
from agentrl.env.containment import open_env
from agentrl.env.contract.answers import MAX_NAME_CHARS
from agentrl.env.names import unknown
from agentrl.env.panel import Panel, load_panel, make_panel, verify
from agentrl.env.registry import Factory, callers_arguments, make
from agentrl.errors import ConfigError, EnvironmentContractError
from agentrl.evaluation.statistics import Rate, success_rate
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.failures import Quarantine, abort_reasons
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.play import Collection, EpisodeSpec
from agentrl.rollout.players import Player
from agentrl.rollout.settings import Placement, RolloutConfig
from agentrl.run.env_backend import open_environments
from agentrl.run.folder import Run
from agentrl.run.settings import RunConfig
from agentrl.seeds import derive_seed
from agentrl.values import ValueFaultError, as_text

OnEpisode = Callable[[Episode], None]


@dataclass(frozen=True)
class Entropy:
    """Mean entropies of a policy's decisions in nats; None for a policy that records none.

    Args:
        token: mean over all decided tokens.
        turn: mean over turns of each turn's mean.
        trajectory: mean over episodes of each episode's mean over turns.
        by_turn: mean of the turns with that index, over the episodes that got there.
    """

    token: float | None = None
    turn: float | None = None
    trajectory: float | None = None
    by_turn: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A policy's score on a panel. Aborted episodes are in no rate and no mean; their reasons are counted.

    Args:
        success: over all task types.
        by_task_type: the same, per task type.
        aborted: episodes that say nothing about the policy.
        aborted_reasons: how often each stopped them.
        mean_return: in the environment's reward units; None without a finished episode.
        mean_turns: replies per episode.
        stop_reasons: of all episodes, the aborted included.
        entropy: of the policy's decisions.
        panel_hash: of the panel's tasks and their content.
        data: what the tasks are, as the environment labels them, e.g. `generated`.
        repeats: plays of each task.
        retried: attempts that were aborted and played again.
        steps_per_second: of all episodes together, the policy's time included; None where nobody timed it.
    """

    success: Rate
    by_task_type: Mapping[str, Rate]
    aborted: int
    aborted_reasons: Mapping[str, int]
    mean_return: float | None
    mean_turns: float | None
    stop_reasons: Mapping[str, int]
    entropy: Entropy
    panel_hash: str
    data: str | None = None
    repeats: int = 1
    retried: int = 0
    steps_per_second: float | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the shape of one decoding of one policy in a run's summary.json."""
        tree = asdict(self)
        overall: dict[str, Any] = tree.pop("success")
        return overall | tree


@dataclass(frozen=True)
class InstructionCheck:
    """What a policy does when told another goal of the same room: whether it reads the instruction.

    Args:
        new_goal: how often the goal that it was told was reached.
        old_goal: how often the goal of the panel's own task was, of which it was told nothing.
        aborted: episodes in neither rate.
        stop_reasons: of all episodes, the aborted included.
    """

    new_goal: Rate
    old_goal: Rate
    aborted: int = 0
    stop_reasons: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    policy: Run | str | Path,
    panel: Panel | str | Path | None = None,
    *,
    env: str | None = None,
    split: str | None = None,
    tasks: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    placement: Placement | None = None,
    interpreter: str | None = None,
    on_episode: OnEpisode | None = None,
) -> Evaluation:
    """Measure a policy.

    Args:
        policy: a `Run`, the folder or name of one, a Hugging Face folder, `random` or `expert`.
        panel: a panel or its file; None takes the first `tasks` of `split` of `env`, which fall back on the
            configuration of the run, or on the defaults.
        env: id of an environment.
        split: of its tasks; the last where the environment has none of the configured name.
        tasks: how many of them.
        env_kwargs: arguments of the environment, on top of those of a run that was trained on it.
        repeats: plays of each task.
        seed: of the environments and of the policy's draws.
        temperature: of the policy's draws; 0 always takes its first choice.
        placement: where environments live, on this machine; None takes a run's own for its own environment,
            else `auto`.
        interpreter: another Python that environments live in; what a run names is not used.
        on_episode: called with each episode as it ends.

    Raises:
        ConfigError: for contradicting or unknown arguments.
        PanelError: when the panel's tasks are not what they were when it was made.
        CheckpointError: when there is no such policy.
    """
    from agentrl.run.policies import open_player  # it loads torch, which the records here do without

    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    if placement not in (None, *get_args(Placement)):
        raise unknown("placement", placement, get_args(Placement))
    given = _given_panel(panel, env, split, tasks, env_kwargs)
    name = str(policy.folder) if isinstance(policy, Run) else str(policy)
    player, config = open_player(name, temperature=temperature)
    if given is None and (env, split, tasks, env_kwargs) == (None, None, None, None):
        given = _configured_file(config)
    if given is None:
        env = env or config.env.id
        kwargs = {**(config.env.kwargs if env == config.env.id else {}), **(env_kwargs or {})}
        split = split or _split(env, kwargs, config.evaluation.split)
    else:
        env, kwargs, split = given.env, dict(given.env_kwargs), given.split
    rollout = config.rollout
    if placement is not None or env != config.env.id:  # what suited the run's own says nothing of another
        rollout = replace(rollout, backend="local", placement=placement or "auto")
    if interpreter is not None:
        workers = replace(rollout.workers, interpreter=interpreter)
        rollout = replace(rollout, placement=placement or "process", workers=workers)
    rollout, _ = resolve_placement(Factory(env, split=split, **kwargs), rollout, split, seed)
    with open_panel_environments(env, split, kwargs, rollout, expert=name == "expert") as environments:
        with environments.borrow() as environment:
            if given is not None:
                verify(given, environment)
            fixed = given or make_panel(
                env, split, tasks or _default_tasks(config, environment, split), kwargs, environment
            )
            label = _label(environment)
        began = time.perf_counter()
        played = play_panel(
            fixed, player, environments, rollout, repeats=repeats, seed=seed, on_episode=on_episode
        )
        found = summarise(played.episodes, fixed, repeats, data=label)
        seconds = time.perf_counter() - began
    turns = sum(len(episode.turns) for episode in (*played.episodes, *played.failures))
    return replace(found, retried=len(played.failures), steps_per_second=turns / seconds)


def configured_panel(config: RunConfig, environment: gymnasium.Env[str, str] | None = None) -> Panel:
    """The panel of a configuration; `environment` is one made for it, None makes one."""
    panel = _configured_file(config)
    if panel is not None:
        verify(panel)
        return panel
    block = config.evaluation
    return make_panel(config.env.id, block.split, block.tasks, config.env.kwargs, environment)


def open_panel_environments(
    env: str, split: str, kwargs: Mapping[str, Any], rollout: RolloutConfig, *, expert: bool = False
) -> Environments:
    """Environments for a panel; with `expert`, they say what their expert would do next."""
    told = {"expert": True} if expert else {}
    return open_environments(Factory(env, split=split, **{**kwargs, **told}), rollout)


def _configured_file(config: RunConfig) -> Panel | None:
    path = config.evaluation.panel
    if path is None:
        return None
    panel = load_panel(Path(path))
    known = config.env.kwargs if panel.env == config.env.id else {}
    for name in callers_arguments(panel.env, panel.env_kwargs):
        if name not in known or known[name] != panel.env_kwargs[name]:
            raise ConfigError(
                f"evaluation.panel: {path} gives {panel.env} the argument {name}, which only its caller may; "
                "wanted a panel without it, the same in env.kwargs, or --panel on the command line"
            )
    return panel


def _split(env: str, kwargs: Mapping[str, Any], preferred: str) -> str:
    """The preferred split where the environment has it, else its last, which is held out by convention."""
    with open_env(lambda: make(env, **kwargs)) as environment:
        splits: tuple[str, ...] = cast(Any, environment.unwrapped).splits
    return preferred if preferred in splits else splits[-1]


def _default_tasks(config: RunConfig, environment: gymnasium.Env[str, str], split: str) -> int:
    return min(config.evaluation.tasks, len(cast(Any, environment.unwrapped).tasks(split)))


def data_label(environments: Environments) -> str | None:
    """What the tasks are, as their environment labels them, e.g. `generated`; None where it does not."""
    with environments.borrow() as environment:
        return _label(environment)


def _label(environment: gymnasium.Env[str, str]) -> str | None:
    label = getattr(environment.unwrapped, "data", None)
    try:
        return None if label is None else as_text(label, MAX_NAME_CHARS)
    except ValueFaultError as fault:
        raise EnvironmentContractError(f"the environment's attribute data {fault}") from fault


def play_panel(
    panel: Panel,
    player: Player,
    environments: Environments,
    rollout: RolloutConfig | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
) -> Collection:
    """Play each task of the panel exactly `repeats` times; every draw depends on (seed, task, repeat) alone.

    Args:
        panel: of tasks.
        player: who is measured.
        environments: of the panel.
        rollout: how many episodes at a time, limits and attempts; None takes the defaults.
        repeats: plays of each task.
        seed: of environments and player.
        on_episode: called with each episode as it ends.

    Returns:
        The episodes, task by task in the panel's order.
    """
    return _play(_specs(panel.env, panel.tasks, repeats, seed), player, environments, rollout, on_episode)


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
        quarantine=Quarantine(block.max_attempts),
        on_episode=on_episode,
    )


def summarise(
    episodes: Sequence[Episode], panel: Panel, repeats: int = 1, *, data: str | None = None
) -> Evaluation:
    """Score episodes of a panel.

    Raises:
        ValueError: unless each of the panel's tasks was played `repeats` times, and nothing else.
    """
    plays = Counter(episode.task for episode in episodes)
    if plays != dict.fromkeys(panel.tasks, repeats):
        wrong = {task: plays[task] for task in {*plays, *panel.tasks} if plays[task] != repeats}
        raise ValueError(
            f"each of the panel's {len(panel.tasks)} tasks is played {repeats} times, not {wrong}"
        )
    finished = [episode for episode in episodes if not episode.stop.aborted]
    aborted = [episode for episode in episodes if episode.stop.aborted]
    types = sorted({episode.task_type for episode in finished if episode.task_type is not None})
    return Evaluation(
        success=_rate(finished),
        by_task_type={name: _rate(e for e in finished if e.task_type == name) for name in types},
        aborted=len(aborted),
        aborted_reasons=dict(abort_reasons(aborted)),
        mean_return=_mean(episode.episode_return for episode in finished),
        mean_turns=_mean(len(episode.turns) for episode in finished),
        stop_reasons=_stop_reasons(episodes),
        entropy=mean_entropy(finished),
        panel_hash=panel.hash,
        data=data,
        repeats=repeats,
    )


def mean_entropy(episodes: Iterable[Episode]) -> Entropy:
    """Entropies of episodes at each level; forced tokens and noise count in none of them."""
    tokens: list[float] = []
    trajectories: list[float] = []
    by_turn: dict[int, list[float]] = defaultdict(list)
    for episode in episodes:
        for index, turn in enumerate(episode.turns):
            if (value := turn.entropy) is not None:
                by_turn[index].append(value)
                tokens += [e for e, decided in zip(turn.entropies, turn.sampled, strict=False) if decided]
        if (value := episode.entropy) is not None:
            trajectories.append(value)
    return Entropy(
        token=_mean(tokens),
        turn=_mean(value for values in by_turn.values() for value in values),
        trajectory=_mean(trajectories),
        by_turn=tuple(fmean(by_turn[index]) for index in sorted(by_turn)),
    )


def instruction_check(
    panel: Panel,
    player: Player,
    environments: Environments,
    rollout: RolloutConfig | None = None,
    *,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
) -> InstructionCheck | None:
    """Play, for each task of the panel, the task of the same room that asks for something else.

    The environment names it (`unwrapped.other_goal(task)`, None where there is none) and says in
    `info["other_success"]` whether the goal of the panel's own task was reached meanwhile.

    Returns:
        Both rates; None when the environment knows no other goals.
    """
    with environments.borrow() as environment:
        other_goal = getattr(environment.unwrapped, "other_goal", lambda task: None)
        others = [other for task in panel.tasks if (other := other_goal(task)) is not None]
    if not others:
        return None
    # Two tasks of one room may name each other's goal, or the same third.
    specs = _specs(panel.env, tuple(dict.fromkeys(others)), 1, derive_seed(seed, "instruction"))
    played = _play(specs, player, environments, rollout, on_episode)
    finished = [episode for episode in played.episodes if not episode.stop.aborted]
    return InstructionCheck(
        new_goal=_rate(finished),
        old_goal=success_rate([[_other_success(episode)] for episode in finished]),
        aborted=len(played.episodes) - len(finished),
        stop_reasons=_stop_reasons(played.episodes),
    )


def _given_panel(
    panel: Panel | str | Path | None,
    env: str | None,
    split: str | None,
    tasks: int | None,
    env_kwargs: Mapping[str, Any] | None,
) -> Panel | None:
    if tasks is not None and tasks < 1:
        raise ConfigError(f"tasks is {tasks}, wanted at least 1")
    if panel is None:
        return None
    if (env, split, tasks, env_kwargs) != (None, None, None, None):
        raise ConfigError(
            "a panel names its own env, arguments, split and tasks: give the panel or those, not both"
        )
    return panel if isinstance(panel, Panel) else load_panel(Path(panel))


def _specs(env: str, tasks: Sequence[str], repeats: int, seed: int) -> list[EpisodeSpec]:
    return [
        EpisodeSpec(
            f"evaluation-{seed}-{task}-{repeat}", env, task, derive_seed(seed, "evaluation", task, repeat)
        )
        for task in tasks
        for repeat in range(repeats)
    ]


def _rate(finished: Iterable[Episode]) -> Rate:
    plays: dict[str, list[bool]] = defaultdict(list)
    for episode in finished:
        plays[episode.task].append(episode.success)
    return success_rate(list(plays.values()))


def _stop_reasons(episodes: Iterable[Episode]) -> dict[str, int]:
    return dict(Counter(episode.stop.value for episode in episodes).most_common())


def _other_success(episode: Episode) -> bool:
    return any(turn.info.get("other_success") is True for turn in episode.turns)


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return fmean(listed) if listed else None
