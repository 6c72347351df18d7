"""Environments in workers crash, hang or grow: every episode is played or reported, no process is left."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from shelves import CountingPlayer, Shelves, by_id
from worker_worlds import (
    Corridor,
    Daemons,
    Engine,
    Growing,
    Heavy,
    Lingering,
    Sleepy,
    SleepyAndSafe,
    Unmakeable,
    Whereabouts,
)

from agentrl.data.trajectory import Episode, Outcome, StopReason
from agentrl.errors import ConfigError, TooManyAbortedError
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool, Environments, ThreadedEnvironments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.placement import open_environments, resolve_placement
from agentrl.rollout.play import Collection, EpisodeSpec, Reset, Step
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import RolloutConfig, WorkersConfig
from agentrl.rollout.workers import EnvironmentLostError, ProcessEnvironments

QUICK = WorkersConfig(count=2, construct_timeout=20, reset_timeout=0.7, step_timeout=0.7)


def specs(tasks: list[str]) -> list[EpisodeSpec]:
    return [EpisodeSpec(f"e{i}", "test/Corridor-v0", task, i) for i, task in enumerate(tasks)]


def played(tasks: list[str], environments: Environments, max_active: int = 4, **more: Any) -> Collection:
    with environments:
        return collect(specs(tasks), RandomPlayer(), environments, max_active=max_active, **more)


def healthy(tasks: list[str]) -> dict[str, Episode]:
    return by_id(played(tasks, EnvironmentPool(Shelves)).episodes)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    before = children()
    yield
    assert children() <= before, "a process was left behind"


TASKS = ["5", "1", "7", "3", "2", "6", "4", "8", "2", "3"]
PLACES: list[Callable[[Any], Environments]] = [
    EnvironmentPool,
    lambda make: ThreadedEnvironments(make, 3),
    lambda make: ProcessEnvironments(make, 3),
    lambda make: ProcessEnvironments(make, 8, WorkersConfig(count=1)),
]


@pytest.mark.parametrize("max_active", [1, 4, 100])
@pytest.mark.parametrize("place", PLACES)
def test_where_episodes_are_played_does_not_change_them(
    place: Callable[[Any], Environments], max_active: int
) -> None:
    assert by_id(played(TASKS, place(Corridor), max_active).episodes) == healthy(TASKS)


def test_workers_are_used_again_by_the_next_collection() -> None:
    with ProcessEnvironments(Corridor, 4, WorkersConfig(count=2)) as environments:
        pids = []
        for _ in range(3):
            collect(specs(TASKS), RandomPlayer(), environments, max_active=4)
            pids.append(children())
        assert pids[0] == pids[1] == pids[2]
        assert environments.restarts == environments.recycled == 0


TROUBLES = [
    ("exit", StopReason.WORKER_ERROR, "exited with 3; its last output: the last thing I say"),
    ("leave", StopReason.ENV_ERROR, "SystemExit: 4"),
    ("segfault", StopReason.WORKER_ERROR, "its worker was killed by SIGSEGV"),
    ("kill", StopReason.WORKER_ERROR, "its worker was killed by SIGKILL"),
    ("hang", StopReason.WORKER_ERROR, "step took longer than 0.7 s"),
    ("hang without yielding", StopReason.WORKER_ERROR, "step took longer than 0.7 s"),
    ("hang in reset", StopReason.WORKER_ERROR, "reset took longer than 0.7 s"),
    ("close everything", StopReason.WORKER_ERROR, "its worker"),
    ("raise", StopReason.ENV_ERROR, "ValueError: no such shelf"),
    ("unpicklable", StopReason.CONTRACT, "cannot be sent from its process"),
    ("unreadable", StopReason.CONTRACT, "cannot be read here: SystemExit: 0"),
    ("huge", StopReason.CONTRACT, "the observation and info of one call take 200 MB, wanted at most 16 MB"),
    ("interrupt", StopReason.ENV_ERROR, "KeyboardInterrupt: not by a key"),
    ("fork and leave", StopReason.WORKER_ERROR, "exited with 3"),
    ("stop", StopReason.WORKER_ERROR, "step took longer than 0.7 s"),
    ("kill the parent", StopReason.WORKER_ERROR, "its worker was killed by SIGKILL"),
]


@pytest.mark.parametrize(("trouble", "stop", "error"), TROUBLES, ids=[each[0] for each in TROUBLES])
def test_trouble_aborts_its_episode_and_no_other(trouble: str, stop: StopReason, error: str) -> None:
    tasks = ["5", f"3 {trouble}", "4", "2", "6", "3", "7"]
    found = played(tasks, ProcessEnvironments(Corridor, 4, QUICK))
    episodes, expected = by_id(found.episodes), healthy([task.partition(" ")[0] for task in tasks])
    spoilt = episodes.pop("e1")
    del expected["e1"]
    assert episodes == expected
    assert (spoilt.stop, spoilt.outcome) == (stop, Outcome.ABORTED)
    assert error in (spoilt.error or "")
    assert {failure.id for failure in found.failures} <= {"e0", "e2", "e3", "e4", "e5", "e6"}


@pytest.mark.parametrize("way", ["fork", "fork in C", "fork a copy that stays"])
def test_a_fork_in_a_worker_answers_nothing_and_ends_with_it(way: str) -> None:
    tasks = ["5", f"3 {way}", "4"]
    environments = ProcessEnvironments(Corridor, 2, WorkersConfig(count=1))
    found = played(tasks, environments)
    assert by_id(found.episodes) | {"e1": None} == healthy(["5", "3", "4"]) | {"e1": None}
    assert by_id(found.episodes)["e1"].turns == healthy(["5", "3", "4"])["e1"].turns
    assert (found.failures, environments.restarts) == ((), 0)


@pytest.mark.parametrize("end", ["close", "recycle", "exit", "hang", "kill"])
def test_a_daemon_of_an_environment_goes_with_its_worker(end: str, tmp_path: Path) -> None:
    config = replace(QUICK, count=1, recycle_episodes=1 if end == "recycle" else None)
    make = partial(Daemons, notes=str(tmp_path))
    with ProcessEnvironments(make, 1, config) as environments:
        environments.submit("e", Reset("5" if end in ("close", "recycle") else f"5 {end}", 0))
        environments.poll(wait=True)
        for _ in range(2):
            environments.submit("e", Step("go on"))
            environments.poll(wait=True)
        daemon = int((tmp_path / "pid").read_text())
        assert psutil.pid_exists(daemon) == (end in ("close", "recycle"))
        environments.release("e")
        if end == "recycle":
            environments.submit("f", Reset("2", 0))
            environments.poll(wait=True)
            wait_for(lambda: not psutil.pid_exists(daemon))
            assert environments.recycled == 1
    assert not psutil.pid_exists(daemon)


def test_a_worker_that_outgrows_its_limit_is_ended_in_the_middle_of_an_episode() -> None:
    environments = ProcessEnvironments(Corridor, 2, WorkersConfig(count=1, recycle_megabytes=200))
    found = played(["8", "3 grow", "4"], environments, 2)
    episodes, expected = by_id(found.episodes), healthy(["8", "3", "4"])
    assert episodes["e1"].stop is StopReason.WORKER_ERROR
    assert re.fullmatch(
        r"its worker held [345]\d\d MB in the middle of an episode, more than 300 MB, that is 1.5 times "
        "rollout.workers.recycle_megabytes=200",
        str(episodes["e1"].error),
    )
    assert [episodes[name] for name in ("e0", "e2")] == [expected[name] for name in ("e0", "e2")]
    assert environments.restarts == 1


class Hoarding(Corridor):
    """A child of its own grows while a step takes its time."""

    def step(self, action: str) -> Any:
        command = [sys.executable, "-c", "import time\nheld = b'x' * (400 << 20)\ntime.sleep(3600)"]
        subprocess.run(command, check=True)


def test_what_a_step_and_its_children_hold_is_looked_at_while_it_takes_its_time() -> None:
    config = WorkersConfig(count=1, recycle_megabytes=200, step_timeout=60)
    (episode,) = played(["3"], ProcessEnvironments(Hoarding, 1, config)).episodes
    assert "in the middle of an episode, more than 300 MB" in str(episode.error)


def test_what_fails_is_played_again_until_it_has_failed_often_enough(tmp_path: Path) -> None:
    tasks = ["5", "3 exit", "4"]
    make = partial(Corridor, notes=str(tmp_path))
    environments = ProcessEnvironments(make, 2, WorkersConfig(count=2, environments=1))
    found = played(tasks, environments, max_attempts=3)
    assert [episode.outcome for episode in found.episodes] == [
        Outcome.SUCCESS,
        Outcome.ABORTED,
        Outcome.SUCCESS,
    ]
    assert [failure.id for failure in found.failures] == ["e1", "e1"]
    resets = Counter(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert resets == {"5": 1, "exit": 3, "4": 1}
    assert environments.restarts == 3


def test_what_fails_once_gives_the_episode_that_it_would_have_given(tmp_path: Path) -> None:
    make = partial(Corridor, notes=str(tmp_path))
    found = played(["3 once"], ProcessEnvironments(make, 1, QUICK), max_attempts=2)
    (episode,), (failure,) = found.episodes, found.failures
    assert failure.stop is StopReason.WORKER_ERROR
    assert "exited with 5" in (failure.error or "")
    assert episode.turns == healthy(["3"])["e0"].turns
    assert episode.outcome is Outcome.SUCCESS


def test_a_task_that_fails_in_a_row_is_quarantined_and_not_tried_again(tmp_path: Path) -> None:
    tasks = ["3 raise"] * 6 + ["2"]
    quarantine = Quarantine(after=3)
    found = played(
        tasks,
        ProcessEnvironments(partial(Corridor, notes=str(tmp_path)), 1, QUICK),
        max_active=1,
        max_attempts=3,
        quarantine=quarantine,
    )
    assert len(list(tmp_path.iterdir())) == 3 + 1
    assert [episode.outcome for episode in found.episodes] == [Outcome.ABORTED] * 6 + [Outcome.SUCCESS]
    assert "quarantined after 3 failures in a row, the last: ValueError: no such shelf" in str(
        found.episodes[-2].error
    )
    assert list(quarantine.tasks) == ["3 raise"]


def test_a_task_that_is_played_to_its_end_in_between_is_not_quarantined() -> None:
    quarantine = Quarantine(after=2)
    for _ in range(5):
        quarantine.add("t", "crash")
        quarantine.clear("t")
    assert not quarantine.tasks


def test_those_who_shared_a_worker_with_a_crash_are_not_blamed() -> None:
    # One worker: each of the three crashes ends all other episodes.
    tasks = ["3 exit", *["8"] * 5]
    found = played(tasks, ProcessEnvironments(Corridor, 6, WorkersConfig(count=1)), 6, max_attempts=3)
    assert [episode.outcome for episode in found.episodes] == [Outcome.ABORTED] + [Outcome.SUCCESS] * 5
    reasons = Counter((failure.id, "its worker died" in str(failure.error)) for failure in found.failures)
    assert reasons["e0", False] == 2
    assert all(others for (name, others) in reasons if name != "e0")


def test_too_many_aborted_stop_the_collection_at_once_with_the_most_frequent_reasons(tmp_path: Path) -> None:
    tasks = ["3 raise"] * 5 + ["2"] * 20
    make = partial(Corridor, notes=str(tmp_path))
    with pytest.raises(TooManyAbortedError, match="5 episodes were aborted, more than 4 allowed") as raised:
        played(tasks, ProcessEnvironments(make, 1, QUICK), 1, max_aborted_share=0.16)
    assert "5 x env_error: ValueError: no such shelf" in str(raised.value)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    ("why", "error"),
    [
        ("hang", "construct took longer than 1 s"),
        ("fail", "ConnectionError: refused"),
    ],
)
def test_an_environment_that_cannot_be_made_aborts_its_episode(why: str, error: str) -> None:
    config = WorkersConfig(count=1, construct_timeout=1)
    found = played(["1", "1"], ProcessEnvironments(partial(Unmakeable, why), 2, config), 2)
    assert all(episode.stop.aborted for episode in found.episodes)
    assert error in str(found.episodes[0].error)


def test_an_environment_that_refuses_its_arguments_stops_the_run() -> None:
    with pytest.raises(ConfigError, match="'dors' is unknown"):
        played(["1"], ProcessEnvironments(partial(Unmakeable, "refuse"), 1))


def test_workers_are_recycled_by_the_number_of_their_episodes() -> None:
    config = WorkersConfig(count=2, recycle_episodes=3)
    environments = ProcessEnvironments(Corridor, 4, config)
    found = played(TASKS, environments)
    assert by_id(found.episodes) == healthy(TASKS)
    assert environments.recycled >= 2
    assert (environments.restarts, found.failures) == (0, ())


def test_workers_are_recycled_by_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.rollout.worker_process._MEMORY_CHECK_INTERVAL", 0.0)
    environments = ProcessEnvironments(Growing, 1, WorkersConfig(count=1, recycle_megabytes=150))
    found = played(["1"] * 8, environments, 1)
    assert all(episode.outcome is Outcome.SUCCESS for episode in found.episodes)
    assert 2 <= environments.recycled <= 8


# Borrowed environments.


def test_a_borrowed_environment_answers_as_if_it_were_here() -> None:
    with ProcessEnvironments(Corridor, 2) as environments, environments.borrow() as env:
        known: Any = env.unwrapped
        assert known.splits == ("train",)
        assert known.tasks("train") == [str(n) for n in range(1, 9)]
        assert known.task_hash("5") == f"{5:064x}"
        assert getattr(known, "data", "none") == "none"
        assert env.reset(seed=0, options={"task": "4"})[0] == "4 shelves"
        assert env.step("go on")[0] == "go on: 3 left"
        with pytest.raises(ValueError, match="invalid literal"):
            known.task_hash("x")


def test_who_borrowed_an_environment_that_dies_is_told() -> None:
    with ProcessEnvironments(Corridor, 2, QUICK) as environments:
        with environments.borrow() as env:
            env.reset(options={"task": "3 exit"})
            env.step("go on")
            with pytest.raises(EnvironmentLostError, match="exited with 3"):
                env.step("go on")
        with environments.borrow() as env:
            assert env.reset(options={"task": "2"})[0] == "2 shelves"


# Another interpreter.


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of its own that sees what is installed here."""
    folder = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "here.pth").write_text("\n".join(path for path in sys.path if path))
    return folder


def test_an_environment_may_live_in_another_interpreter(other_python: Path) -> None:
    config = WorkersConfig(count=1, interpreter=str(other_python / "bin" / "python"))
    found = played(["2"], ProcessEnvironments(Whereabouts, 1, config))
    assert found.episodes[0].turns[0].observation == str(other_python)


def test_an_interpreter_that_is_not_there_or_knows_nothing_of_us_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"interpreter: /no/python does not run: No such file"):
        played(["2"], ProcessEnvironments(Corridor, 1, WorkersConfig(interpreter="/no/python")))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    config = WorkersConfig(interpreter=str(tmp_path / "bin" / "python"))
    with pytest.raises(ConfigError, match=r"(?s)cannot start.*exited with 1.*No module named 'agentrl'"):
        played(["2"], ProcessEnvironments(Corridor, 1, config))


def test_an_environment_that_a_script_registers_travels_to_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent("""
        import gymnasium
        from agentrl.env import Factory, TextSpace, register
        from agentrl.rollout.collector import collect
        from agentrl.rollout.play import EpisodeSpec
        from agentrl.rollout.players import RandomPlayer
        from agentrl.rollout.workers import ProcessEnvironments

        class Mine(gymnasium.Env):
            splits = ("train",)
            observation_space = action_space = TextSpace()
            def __init__(self, split="train", word="x"): self.word = word
            def tasks(self, split): return ["only"]
            def task_hash(self, task): return "0" * 64
            def reset(self, *, seed=None, options=None): return self.word, {"success": False}
            def step(self, action): return "", 1.0, True, False, {"success": True}

        register("mine/Mine-v0", Mine)
        with ProcessEnvironments(Factory("mine/Mine-v0", word="hello"), 1) as environments:
            spec = EpisodeSpec("e", "mine/Mine-v0", "only", 0)
            (episode,) = collect([spec], RandomPlayer(), environments, max_active=1).episodes
        print(episode.outcome, episode.turns[0].observation)
        """)
    )
    answer = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (answer.stdout.split(), answer.stderr) == (["success", "hello"], "")


# The end of workers.


def test_an_interrupt_closes_everything_and_the_same_environments_can_go_on() -> None:
    class Interrupted(CountingPlayer):
        def poll(self) -> Any:
            if len(self.rounds) == 3:
                self.rounds.append(0)
                raise KeyboardInterrupt
            return super().poll()

    before = children()
    with ProcessEnvironments(Engine, 4, QUICK) as environments:
        player = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            collect(specs(TASKS), player, environments, max_active=4)
        left = [(each.cmdline(), each.status()) for each in map(psutil.Process, children() - before)]
        assert left == []
        player.waiting.clear()
        found = collect(specs(["2", "3"]), player, environments, max_active=4)
        assert [episode.outcome for episode in found.episodes] == [Outcome.SUCCESS] * 2


def test_two_threads_can_close_at_the_same_time() -> None:
    environments = ProcessEnvironments(partial(Lingering, 0.3), 4, QUICK)
    collect(specs(["2"] * 4), RandomPlayer(), environments, max_active=4)
    raised: list[BaseException] = []

    def close() -> None:
        try:
            environments.close()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert raised == []


@pytest.mark.parametrize("trouble", ["", "hang without yielding"])
def test_workers_and_their_children_end_with_a_driver_that_is_killed(trouble: str, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from worker_worlds import Engine
        from test_workers import specs
        from agentrl.rollout.collector import collect
        from agentrl.rollout.workers import ProcessEnvironments
        import time
        class Slow:
            def __init__(self): self.asked = []
            def submit(self, request): self.asked.append(request)
            def poll(self):
                from agentrl.rollout.play import Reply
                if any(request.turn >= 2 for request in self.asked) and not {trouble!r}:
                    time.sleep(3600)
                done, self.asked = self.asked, []
                return [(request.episode_id, Reply("go on")) for request in done]
            def close(self, episode): pass
        collect(specs(["8 {trouble}".strip()] * 4), Slow(), ProcessEnvironments(Engine, 4), max_active=4)
    """)
    driver = subprocess.Popen([sys.executable, "-c", script])
    try:
        family = _family(driver.pid, wanted=1 + 2 + 4)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def _family(pid: int, wanted: int) -> list[psutil.Process]:
    """The children of a process, once there are enough of them and the first steps were made."""
    until = time.monotonic() + 30
    found: list[psutil.Process] = []
    while time.monotonic() < until and len(found) < wanted - 1:
        found = psutil.Process(pid).children(recursive=True)
        time.sleep(0.05)
    assert len(found) >= wanted - 1
    time.sleep(0.3)
    return found


def test_64_episodes_survive_a_hail_of_kills() -> None:
    """Workers and the engines they have started are killed while they work; every task is accounted for."""
    tasks = [str(3 + i % 6) for i in range(64)]
    config = WorkersConfig(count=3, environments=2, construct_timeout=20, step_timeout=5, reset_timeout=5)
    environments = ProcessEnvironments(Engine, 6, config)
    hits: Counter[str] = Counter()
    over = threading.Event()

    def kill_at_random() -> None:
        draw = random.Random(0)
        while not over.wait(0.03):
            workers = [worker for worker in list(environments._workers) if worker.pending]
            if not workers or sum(hits.values()) >= 24:
                continue
            worker = draw.choice(workers)
            try:
                engines = psutil.Process(worker.process.pid).children()
                if len(engines) < 2:
                    continue  # it has hardly begun: no episode is played in it
                victim = "engine" if sum(hits.values()) % 2 else "worker"
                os.kill(
                    draw.choice(engines).pid if victim == "engine" else worker.process.pid, signal.SIGKILL
                )
            except (ProcessLookupError, psutil.Error):
                continue
            hits[victim] += 1

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    ended: list[str] = []
    try:
        with environments:
            found = collect(
                specs(tasks),
                RandomPlayer(),
                environments,
                max_active=6,
                max_attempts=3,
                on_episode=lambda episode: ended.append(episode.id),
            )
    finally:
        over.set()
        killer.join()
    assert sum(hits.values()) >= 10
    assert min(hits["worker"], hits["engine"]) >= 5
    assert sorted(ended) == sorted(f"e{i}" for i in range(64))  # none lost, none twice
    assert [episode.id for episode in found.episodes] == [f"e{i}" for i in range(64)]
    expected = healthy(tasks)
    for episode in found.episodes:
        assert episode.outcome is Outcome.ABORTED or episode == expected[episode.id]
        assert episode.outcome is not Outcome.ABORTED or episode.error
    assert environments.restarts >= hits["worker"] - 1  # one may have been recycled as it was hit
    assert len(found.failures) >= 5


# Threads.


def test_a_call_that_hangs_in_a_thread_is_given_up_and_the_others_go_on() -> None:
    tasks = ["5", "3 hang", "4", "2"]
    environments = ThreadedEnvironments(Corridor, 2, QUICK)
    # The thread that hangs is a daemon of this process and sleeps on.
    found = by_id(played(tasks, environments, 2).episodes)
    expected = healthy(["5", "3", "4", "2"])
    assert (found["e1"].stop, found["e1"].error) == (
        StopReason.WORKER_ERROR,
        "step took longer than 0.7 s",
    )
    assert [found[name] for name in ("e0", "e2", "e3")] == [expected[name] for name in ("e0", "e2", "e3")]


def test_threads_wait_together() -> None:
    together, most = [0], [0]
    lock = threading.Lock()

    class Watched(Corridor):
        def step(self, action: str) -> Any:
            with lock:
                together[0] += 1
                most[0] = max(most[0], together[0])
            time.sleep(0.01)
            with lock:
                together[0] -= 1
            return super().step(action)

    played(["8"] * 4, ThreadedEnvironments(Watched, 4), 4)
    assert most[0] == 4


# Choosing a placement.


@pytest.mark.parametrize(
    ("make", "placement", "each"),
    [
        (Corridor, "inline", None),
        (Sleepy, "process", None),
        (SleepyAndSafe, "thread", None),
        (Heavy, "process", 1),
    ],
)
def test_auto_decides_by_the_time_a_call_takes_and_what_is_declared(
    make: Any, placement: str, each: int | None
) -> None:
    config, note = resolve_placement(make, RolloutConfig(), "train")
    assert (config.placement, config.workers.environments) == (placement, each)
    assert f"placement {placement}: a call takes" in str(note)
    assert resolve_placement(make, RolloutConfig(placement="inline"), "train")[1] is None


def test_an_interpreter_leaves_only_processes(other_python: Path) -> None:
    workers = WorkersConfig(interpreter=str(other_python / "bin" / "python"))
    assert resolve_placement(Corridor, RolloutConfig(workers=workers), "train")[0].placement == "process"
    with pytest.raises(ConfigError, match="placement=inline plays in this process"):
        RolloutConfig(placement="inline", workers=workers)


def test_an_environment_that_dies_while_it_is_measured_gets_a_process() -> None:
    config, note = resolve_placement(partial(Corridor, notes="/nowhere"), RolloutConfig(), "train")
    assert config.placement == "inline"  # errors are cheap as well
    config, note = resolve_placement(Dying, RolloutConfig(), "train")
    assert config.placement == "process"
    assert "exited with 3" in str(note)
    with open_environments(Dying, config) as environments:
        assert isinstance(environments, ProcessEnvironments)


class Dying(Corridor):
    def step(self, action: str) -> Any:
        os._exit(3)
