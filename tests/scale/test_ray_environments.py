"""Environments in Ray actors: played as in this process, lost episodes are played again, none is left."""

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from shelves import CountingPlayer, Shelves, by_id
from test_branching import TREE, play_branches
from worker_worlds import Corridor, SnapshotCorridor, Unmakeable

from agentrl.data.trajectory import Episode, Outcome, StopReason
from agentrl.errors import ConfigError
from agentrl.policy.engine import SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer, make_dialogue
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool, Environments
from agentrl.rollout.play import ActionRequest, Collection, EpisodeSpec, Reset, Step, Stop
from agentrl.rollout.players import LanguagePlayer, RandomPlayer
from agentrl.rollout.settings import RayConfig, WorkersConfig
from agentrl.rollout.workers import EnvironmentLostError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from agentrl.scale import ray_environments  # noqa: E402
from agentrl.scale.ray_environments import RayEnvironments  # noqa: E402

ONE = WorkersConfig(count=1, construct_timeout=60, reset_timeout=30, step_timeout=30)
TWO = RayConfig(actors=2)
TASKS = ["5", "1", "7", "3", "2", "6", "4", "8", "2", "3"]


@pytest.fixture(autouse=True)
def _no_worker_is_left(ray_is_there: None) -> Iterator[None]:
    yield
    until = time.monotonic() + 60
    while [pid for pid in children() if "agentrl.rollout.worker" in _command(pid)]:
        assert time.monotonic() < until, "a worker outlives its actor"
        time.sleep(0.05)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _command(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def specs(tasks: Sequence[str]) -> list[EpisodeSpec]:
    return [EpisodeSpec(f"e{i}", "test/Corridor-v0", task, i) for i, task in enumerate(tasks)]


def played(
    tasks: Sequence[str], environments: Environments, max_active: int = 4, player: Any = None, **more: Any
) -> Collection:
    with environments:
        return collect(specs(tasks), player or RandomPlayer(), environments, max_active=max_active, **more)


def healthy(tasks: Sequence[str]) -> dict[str, Episode]:
    return by_id(played(tasks, EnvironmentPool(Shelves)).episodes)


def test_where_episodes_are_played_does_not_change_them() -> None:
    with RayEnvironments(Corridor, 6, ONE, TWO) as environments:
        assert environments.capacity == 6
        for most in (1, 4, 100):
            found = collect(specs(TASKS), RandomPlayer(), environments, max_active=most)
            assert by_id(found.episodes) == healthy(TASKS)
        assert (environments.restarts, environments.recycled, found.failures) == (0, 0, ())
    again = collect(specs(["2"]), RandomPlayer(), environments, max_active=1)  # closed, it begins anew
    environments.close()
    assert by_id(again.episodes) == healthy(["2"])


class Together:
    """A language model that replies when all of four episodes have asked: its batches are always the same."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        texts = ["5 shelves", "go on: 4 left", "take mug: 3 left", "take pen: 2 left"]
        tokenizer = fit_tokenizer(texts * 4, 320)
        model = build_model(PolicyConfig(device="cpu", max_context=256, initial_std=0.1), tokenizer, seed=0)
        dialogue = make_dialogue(tokenizer)
        engine = TorchEngine(model, stop_ids=dialogue.stop_ids, max_context=256, max_sequences=4)
        self.player = LanguagePlayer(dialogue, engine, SamplingParams(temperature=1.0, max_tokens=8))
        self.waiting: list[ActionRequest] = []

    def submit(self, request: ActionRequest) -> None:
        self.waiting.append(request)

    def poll(self) -> Any:
        if len(self.waiting) < 4:
            return []
        for request in sorted(self.waiting, key=lambda request: request.episode_id):
            self.player.submit(request)
        self.waiting.clear()
        found: list[Any] = []
        while len(found) < 4:
            found += self.player.poll()
        return found

    def close(self, episode_id: str) -> None:
        self.player.close(episode_id)


def test_a_policy_acts_as_here_and_its_logprobs_are_the_same() -> None:
    tasks = ["5"] * 4
    expected = by_id(played(tasks, EnvironmentPool(Shelves), player=Together()).episodes)
    found = by_id(played(tasks, RayEnvironments(Corridor, 4, ONE, TWO), player=Together()).episodes)
    assert found.keys() == expected.keys()
    actions = {turn.action for episode in expected.values() for turn in episode.turns}
    assert actions == {"go on", "take mug", "take pen"}
    for name, episode in found.items():
        for turn, same in zip(episode.turns, expected[name].turns, strict=True):
            assert (turn.observation, turn.action_ids) == (same.observation, same.action_ids)
            assert turn.logprobs == pytest.approx(same.logprobs, abs=1e-5)


TROUBLES = [
    ("exit", StopReason.WORKER_ERROR, "exited with 3; its last output: the last thing I say"),
    ("leave", StopReason.ENV_ERROR, "SystemExit: 4"),
    ("segfault", StopReason.WORKER_ERROR, "its worker was killed by SIGSEGV"),
    ("kill", StopReason.WORKER_ERROR, "its worker was killed by SIGKILL"),
    ("hang", StopReason.WORKER_ERROR, "step took longer than 5 s"),
    ("hang without yielding", StopReason.WORKER_ERROR, "step took longer than 5 s"),
    ("raise", StopReason.ENV_ERROR, "ValueError: no such shelf"),
    ("unpicklable", StopReason.CONTRACT, "cannot be sent from its process"),
]


@pytest.mark.slow
def test_troubles_abort_their_episodes_and_no_other() -> None:
    tasks = ["5", *(f"3 {trouble}" for trouble, _, _ in TROUBLES), "4", "2", "6"]
    quick = WorkersConfig(count=1, construct_timeout=60, reset_timeout=20, step_timeout=5)
    environments = RayEnvironments(Corridor, 4, quick, TWO)
    episodes = by_id(played(tasks, environments).episodes)
    expected = healthy([task.partition(" ")[0] for task in tasks])
    for number, (_, stop, error) in enumerate(TROUBLES, start=1):
        spoilt = episodes.pop(f"e{number}")
        del expected[f"e{number}"]
        assert (spoilt.stop, spoilt.outcome) == (stop, Outcome.ABORTED)
        assert error in str(spoilt.error)
    assert episodes == expected
    assert environments.restarts == 5


@pytest.mark.slow
def test_an_environment_that_refuses_its_arguments_stops_the_run() -> None:
    with pytest.raises(ConfigError, match="'dors' is unknown"):
        played(["1"], RayEnvironments(partial(Unmakeable, "refuse"), 1, ONE, TWO))


@pytest.mark.slow
def test_workers_that_are_replaced_are_counted() -> None:
    config = WorkersConfig(count=1, recycle_episodes=1)
    environments = RayEnvironments(Corridor, 2, config, RayConfig(actors=1))
    assert by_id(played(TASKS[:4], environments, 1).episodes) == healthy(TASKS[:4])
    assert environments.recycled == 3  # the fourth ends with all
    assert environments.restarts == 0


@pytest.mark.slow
def test_snapshots_travel_and_are_restored() -> None:
    expected = play_branches(TREE, k=5, make=Shelves, player=RandomPlayer(), max_active=1)
    environments = RayEnvironments(SnapshotCorridor, 3, ONE, TWO)
    found = play_branches(TREE, k=5, make=environments, player=RandomPlayer(), max_active=1)
    assert found.episodes == expected.episodes
    assert found.branches["restored"] == 4


@pytest.mark.slow
def test_a_borrowed_environment_answers_as_if_it_were_here() -> None:
    with RayEnvironments(Corridor, 2, ONE, TWO) as environments:
        with environments.borrow() as env:
            known: Any = env.unwrapped
            assert known.splits == ("train",)
            assert known.tasks("train") == [str(n) for n in range(1, 9)]
            assert getattr(known, "data", "none") == "none"
            assert env.reset(seed=0, options={"task": "4"})[0] == "4 shelves"
            assert env.step("go on")[0] == "go on: 3 left"
            with pytest.raises(ValueError, match="invalid literal"):
                known.task_hash("x")
        with environments.borrow() as env:
            env.reset(options={"task": "3 exit"})
            env.step("go on")
            with pytest.raises(EnvironmentLostError, match="exited with 3"):
                env.step("go on")
        with environments.borrow() as env, environments.borrow() as other:
            assert env.reset(options={"task": "2"})[0] == "2 shelves"
            assert other.reset(options={"task": "3"})[0] == "3 shelves"
            with pytest.raises(RuntimeError, match="every place"), environments.borrow():
                pass


# Messages.


class Replying(CountingPlayer):
    """Counts its replies."""

    replies = 0

    def poll(self) -> Any:
        found = super().poll()
        self.replies += len(found)
        return found


@pytest.mark.parametrize("at_once", [32, *(pytest.param(few, marks=pytest.mark.slow) for few in (3, 1))])
def test_32_episodes_need_one_message_for_ten_steps(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ray_environments, "_MAX_WAIT", math.inf
    )  # so that the result does not depend on speed
    player = Replying(largest=at_once)
    counts: list[tuple[int, int]] = []
    with RayEnvironments(Corridor, 32, ONE, TWO) as environments:
        collect(
            specs(["8", "6", "7", "8"] * 24),
            player,
            environments,
            max_active=32,
            on_episode=lambda episode: counts.append((environments.messages, player.replies)),
        )
    messages, steps = counts[96 - 32 - 1]  # while there were more episodes to replace those that ended
    assert steps > 400
    assert 10 * messages <= steps


# What is lost.


class Killing(CountingPlayer):
    """Calls a function at its third poll."""

    def __init__(self, deed: Any) -> None:
        super().__init__()
        self.deed = deed

    def poll(self) -> Any:
        if len(self.rounds) == 3:
            self.deed()
        return super().poll()


def replies(tasks: Sequence[str]) -> dict[str, Episode]:
    return by_id(played(tasks, EnvironmentPool(Shelves), player=CountingPlayer()).episodes)


def test_episodes_of_an_actor_that_is_lost_are_played_again_and_nobody_is_blamed() -> None:
    environments = RayEnvironments(Corridor, 6, ONE, TWO)
    victim = environments._hosts[0]
    player = Killing(lambda: ray.kill(victim.actor))
    found = played(["8"] * 8, environments, 6, player, max_attempts=1)
    assert by_id(found.episodes) == replies(["8"] * 8)
    assert 1 <= len(found.failures) <= 3
    assert {failure.stop for failure in found.failures} == {StopReason.WORKER_ERROR}
    assert all("was lost" in str(failure.error) for failure in found.failures)
    assert environments.restarts == 1


@pytest.mark.slow
def test_the_last_actor_is_replaced_as_often_as_was_allowed() -> None:
    environments = RayEnvironments(Corridor, 2, ONE, RayConfig(actors=1, max_restarts=1))
    lost = Killing(lambda: ray.kill(environments._hosts[0].actor))
    with environments:
        found = collect(specs(["6"] * 2), lost, environments, max_active=2)
        assert by_id(found.episodes) == replies(["6"] * 2)
        lost.rounds.clear()
        with pytest.raises(
            EnvironmentLostError, match=r"the last one, and rollout.ray.max_restarts=1 replacements"
        ):
            collect(specs(["6"] * 2), lost, environments, max_active=2)


@pytest.mark.slow
def test_an_actor_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = RayEnvironments(Corridor, 2, ONE, RayConfig(actors=1))
    monkeypatch.setattr(ray_environments, "_RESPONSE_TIMEOUT", 2.0)
    pid = next(pid for pid in children() if any("EnvironmentHost" in part for part in _command(pid)))
    player = Killing(lambda: None if environments.restarts else os.kill(pid, signal.SIGSTOP))
    found = played(["6"] * 2, environments, 2, player)
    assert by_id(found.episodes) == replies(["6"] * 2)
    assert {"no answer in 2 s" in str(failure.error) for failure in found.failures} == {True}


@pytest.mark.slow
def test_an_episode_learns_of_its_loss_when_it_asks_again() -> None:
    with RayEnvironments(Corridor, 2, ONE, RayConfig(actors=1)) as environments:
        environments.submit("e", Reset("5", 0))
        assert len(environments.poll(wait=True)) == 1
        ray.kill(environments._hosts[0].actor)
        with pytest.raises(EnvironmentLostError), environments.borrow():
            pass
        environments.submit("e", Step("go"))
        ((_, answer),) = environments.poll(wait=True)
        assert isinstance(answer, Stop)
        assert (answer.reason, answer.bystander) == (StopReason.WORKER_ERROR, True)
        environments.release("e", broken=True)


# Before anything starts.


def test_more_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"actors is 2, each with 1000 CPUs, wanted at most 0: the cluster"):
        RayEnvironments(Corridor, 2, ONE, RayConfig(actors=2, cpus=1000))


class Absent:
    """Cannot be imported where an actor starts."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def call(self, request: bytes) -> bytes:
        raise NotImplementedError


@pytest.mark.slow
def test_an_actor_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_environments, "_Actor", ray.remote(Absent))
    with pytest.raises(
        ConfigError, match=r"actor cannot start on [\d.]+: ModuleNotFoundError: No module named"
    ):
        RayEnvironments(Corridor, 2, ONE, RayConfig(actors=1))
