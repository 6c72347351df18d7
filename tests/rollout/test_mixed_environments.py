"""Several environments in one: each task goes to its own, and each keeps its placement and its errors."""

import pytest
from shelves import Shelves, SnapshotShelves
from worker_worlds import Corridor

from agentrl.data.trajectory import StopReason
from agentrl.errors import TooManyAbortedError
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool, Environments, ThreadedEnvironments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.mixture import MixedEnvironments
from agentrl.rollout.play import EpisodeSpec, Reset, Restore, Step, Transition
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments


class Labelled(Shelves):
    """Shelves whose observations say which of several they are."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def on_reset(self, answer: tuple[str, dict[str, object]]) -> tuple[str, dict[str, object]]:
        return f"{self.label}: {answer[0]}", answer[1]


class Torn(Shelves):
    def step(self, action: str) -> None:
        raise RuntimeError("torn")


def specs(*tasks: str) -> list[EpisodeSpec]:
    return [EpisodeSpec(f"e{index}", "test/Any-v0", task, index) for index, task in enumerate(tasks)]


def everywhere() -> dict[str, Environments]:
    workers = WorkersConfig(count=1, construct_timeout=60)
    return {
        "inline": EnvironmentPool(lambda: Labelled("inline")),
        "thread": ThreadedEnvironments(lambda: Labelled("thread"), 3),
        "process": ProcessEnvironments(Corridor, 2, workers),
    }


def test_each_task_is_played_in_its_own_environment_wherever_that_lives() -> None:
    tasks = [f"{name}/{steps}" for steps in (3, 1, 5, 2) for name in ("process", "thread", "inline")]
    with MixedEnvironments(everywhere()) as environments:
        found = collect(specs(*tasks), RandomPlayer(), environments, max_active=12).episodes
    assert [(episode.task, len(episode.turns), episode.success) for episode in found] == [
        (task, int(task.partition("/")[2]), True) for task in tasks
    ]
    first = {episode.task: episode.turns[0].observation for episode in found}
    assert first["thread/5"] == "thread: 5 shelves"
    assert first["inline/2"] == "inline: 2 shelves"
    assert first["process/2"] == "2 shelves"


def test_an_episode_is_the_same_alone_and_among_others() -> None:
    with MixedEnvironments(everywhere()) as environments:
        mixed = collect(specs("inline/4", "thread/4"), RandomPlayer(), environments, max_active=2).episodes
    with EnvironmentPool(Shelves) as pool:
        alone = collect(specs("4", "4"), RandomPlayer(), pool, max_active=2).episodes
    actions = [[[turn.action for turn in episode.turns] for episode in each] for each in (mixed, alone)]
    assert actions[0] == actions[1]


def test_the_capacity_is_that_of_all_or_none() -> None:
    pool, threads = EnvironmentPool(Shelves), ThreadedEnvironments(Shelves, 3)
    assert MixedEnvironments({"a": threads, "b": ThreadedEnvironments(Shelves, 4)}).capacity == 7
    assert MixedEnvironments({"a": threads, "b": pool}).capacity is None


def test_a_failure_names_its_environment_and_quarantines_its_task_alone() -> None:
    quarantine = Quarantine(2)
    with MixedEnvironments(
        {"sound": EnvironmentPool(Shelves), "torn": EnvironmentPool(Torn)}
    ) as environments:
        found = collect(
            specs("sound/2", "torn/2"),
            RandomPlayer(),
            environments,
            max_active=2,
            max_attempts=2,
            quarantine=quarantine,
        ).episodes
    assert [episode.stop for episode in found] == [StopReason.TERMINATED, StopReason.ENV_ERROR]
    assert (found[1].error or "").startswith("torn: RuntimeError: torn")
    assert list(quarantine.tasks) == ["torn/2"]
    with (
        MixedEnvironments({"torn": EnvironmentPool(Torn)}) as environments,
        pytest.raises(TooManyAbortedError, match="1 x env_error: torn: RuntimeError: torn"),
    ):
        collect(specs("torn/2"), RandomPlayer(), environments, max_active=1, max_aborted_share=0.0)


def test_a_snapshot_is_restored_in_the_environment_that_made_it() -> None:
    with MixedEnvironments(
        {"plain": EnvironmentPool(Shelves), "kept": EnvironmentPool(SnapshotShelves)}
    ) as environments:
        environments.submit("parent", Reset("kept/5", 0, keep=True))
        ((_, answer),) = environments.poll(wait=True)
        assert isinstance(answer, Transition)
        environments.submit("child", Restore(answer.snapshot))
        environments.poll(wait=True)
        environments.submit("child", Step("go on"))
        ((episode, after),) = environments.poll(wait=True)
        assert isinstance(after, Transition)
        assert (episode, after.observation) == ("child", "go on: 4 left")


def test_the_environments_of_a_task_can_be_borrowed_from() -> None:
    with MixedEnvironments(everywhere()) as environments:
        own, task = environments.find("inline/3")
        with own.borrow() as environment:
            assert environment.reset(options={"task": task})[0] == "inline: 3 shelves"
        with pytest.raises(TypeError, match="several environments"):
            environments.borrow()
    pool = EnvironmentPool(Shelves)
    assert pool.find("inline/3") == (pool, "inline/3")


def test_nothing_is_waited_for_once_all_is_closed() -> None:
    environments = MixedEnvironments(everywhere())
    environments.submit("a", Reset("process/3", 0))
    environments.close()
    assert environments.poll(wait=True) == []
