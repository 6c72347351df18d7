"""ScienceWorld while workers and JVMs are killed: every task is played or reported, and no JVM is left."""

import os
import random
import signal
import threading
from collections import Counter

import psutil
import pytest

from agentrl.data.trajectory import Outcome
from agentrl.env import Factory, make
from agentrl.rollout.collector import collect
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments

pytest.importorskip("scienceworld", reason="needs pip install -e '.[scienceworld]'")

ID = "agentrl/ScienceWorld-v0"
SHORT = {"tasks": ["find-non-living-thing", "find-plant"], "actions": "lexicon", "max_steps": 6}


def jvms() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name() == "java"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("count", "most", "least"), [(26, 5, 4), pytest.param(64, 14, 10, marks=pytest.mark.slow)]
)
def test_episodes_survive_while_workers_and_jvms_are_killed(count: int, most: int, least: int) -> None:
    with make(ID, **SHORT) as env:
        tasks = env.unwrapped.tasks("train")  # type: ignore[attr-defined]
    specs = [EpisodeSpec(f"e{i}", ID, tasks[i % 16], i) for i in range(count)]
    environments = ProcessEnvironments(Factory(ID, **SHORT), 4, WorkersConfig(count=2, environments=2))
    hits: Counter[str] = Counter()
    over = threading.Event()

    def kill_at_random() -> None:
        draw = random.Random(1)
        while not over.wait(0.5):
            busy = [worker for worker in list(environments._workers) if worker.pending]
            if not busy or sum(hits.values()) >= most:
                continue
            worker = draw.choice(busy)
            try:
                family = psutil.Process(worker.process.pid).children(recursive=True)
                servers = [each for each in family if each.name() == "java"]
                if not servers:
                    continue  # no episode has started
                victim = ("worker", "jvm")[sum(hits.values()) % 2]
                os.kill(
                    worker.process.pid if victim == "worker" else draw.choice(servers).pid, signal.SIGKILL
                )
            except (ProcessLookupError, psutil.Error):
                continue
            hits[victim] += 1

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        with environments:
            found = collect(specs, RandomPlayer(), environments, max_active=4, max_attempts=4)
    finally:
        over.set()
        killer.join()
    print(dict(hits), environments.restarts, Counter(str(episode.error) for episode in found.failures))
    assert sum(hits.values()) >= least
    assert min(hits.values()) >= least // 2
    assert [episode.id for episode in found.episodes] == [spec.id for spec in specs]
    for episode in found.episodes:
        assert (episode.outcome is Outcome.ABORTED) == (episode.error is not None)
        assert episode.outcome is Outcome.ABORTED or episode.turns
    assert sum(episode.outcome is not Outcome.ABORTED for episode in found.episodes) > count // 2
    assert len(found.failures) >= least
    assert jvms() == []
