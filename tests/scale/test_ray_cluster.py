"""The connection to Ray: it leaves no process behind, and a wrong address is refused at once."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import wait_for

from agentrl.errors import ConfigError

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from agentrl.errors import ClusterLostError
from agentrl.scale import cluster as cluster_module
from agentrl.scale.cluster import connected, ping


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"nothing answers at {address}: .*refused"):
            ping(address)


def test_an_address_where_somebody_else_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConfigError, match=f"the server at {address} is not a Ray cluster"):
            ping(address)


def test_a_head_that_answers_no_more_is_noticed_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(cluster_module, "_CHECK_INTERVAL", 0.01)
        monkeypatch.setattr(cluster_module, "_LOST_AFTER", 0.02)
        monitor = cluster_module._HeadMonitor(address)
        monkeypatch.setattr(cluster_module._connection, "monitor", monitor)
        monkeypatch.setattr(cluster_module._connection, "address", address)
        monitor.start()
        wait_for(lambda: monitor.lost is not None)
        port = address.rpartition(":")[2]
        with pytest.raises(
            ClusterLostError,
            match=f"its head at {address} has not answered .* ray start --head --port={port} "
            rf"\(on other machines: ray start --address={address}\). Then .* agentrl train --resume RUN",
        ):
            cluster_module.check_cluster()
        wait_for(lambda: "agentrl train --resume RUN" in capsys.readouterr().err)
        monitor.end()
        monitor.join(20)


@pytest.mark.slow
def test_auto_without_a_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(process.name() == "gcs_server" for process in psutil.process_iter()):
        pytest.skip("somebody has started Ray on this machine")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match="no Ray cluster at auto"), connected("auto"):
        pass


OPENING = f"""
    import sys
    sys.path[:0] = {sys.path!r}
    import gymnasium, psutil, signal, time
    from agentrl.env import Factory, TextSpace, register
    from agentrl.rollout.collector import collect
    from agentrl.rollout.play import EpisodeSpec, Reply
    from agentrl.rollout.players import RandomPlayer
    from agentrl.rollout.settings import RayConfig, WorkersConfig
    from agentrl.scale.cluster import connected, ping
    from agentrl.scale.ray_environments import RayEnvironments

    class Mine(gymnasium.Env):
        splits = ("train",)
        observation_space = action_space = TextSpace()
        def __init__(self, split="train", word="x"): self.word = word
        def tasks(self, split): return ["only"]
        def task_hash(self, task): return "0" * 64
        def reset(self, *, seed=None, options=None): return self.word, {{"success": False}}
        def step(self, action): return "", 1.0, action == "stop", False, {{"success": True}}

    register("mine/Mine-v0", Mine)
    def environments():
        make = Factory("mine/Mine-v0", word="hello")
        return RayEnvironments(make, 4, WorkersConfig(count=1), RayConfig(actors=2))
    specs = [EpisodeSpec(f"e{{number}}", "mine/Mine-v0", "only", 0) for number in range(4)]
    def processes():
        return [each.pid for each in psutil.Process().children(recursive=True)]
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(OPENING) + textwrap.dedent(text))
    return path


@pytest.mark.slow
def test_what_a_script_registers_travels_and_ray_ends_with_its_last_user(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        class Player(RandomPlayer):
            def poll(self):
                return [(name, Reply("stop")) for name, _ in super().poll()]
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with environments() as first:
            with environments() as second:
                borrowed = second.borrow()
                with borrowed as env:
                    print(env.reset(options={"task": "only"})[0])
            episodes = collect(specs, Player(), first, max_active=4).episodes
            print(*{episode.turns[0].observation for episode in episodes})
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        for _ in range(600):
            if not processes(): break
            time.sleep(0.1)
        print(len(processes()))
        """,
    )
    answer = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=280)
    assert (answer.stdout.split(), answer.stderr) == (["hello", "hello", "0"], "")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a program and wait until it is collecting, when it prints its number of processes."""
    path = script(
        tmp_path,
        """
        class Player(RandomPlayer):
            polls = 0
            def poll(self):
                self.polls += 1
                if self.polls == 5:
                    print(len(processes()), flush=True)
                return [(name, Reply("go on")) for name, _ in super().poll()]
        with environments() as mine:
            collect(specs, Player(), mine, max_active=4)
        """,
    )
    process = subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("ctrl_c", [True, False])
def test_nothing_is_left_of_a_driver_that_is_interrupted_or_killed(
    driver: subprocess.Popen[str], ctrl_c: bool
) -> None:
    assert driver.stdout is not None
    assert int(driver.stdout.readline()) > 6  # Ray's own, two actors, their workers and guards
    family = psutil.Process(driver.pid).children(recursive=True)
    if ctrl_c:
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        assert driver.wait(timeout=120) != 0
        assert "KeyboardInterrupt" in driver.stderr.read()
    else:
        driver.kill()
    _, alive = psutil.wait_procs(
        family, timeout=120
    )  # Ray's agents look for their machine's end for a minute
    assert [process.cmdline() for process in alive] == []


@pytest.mark.slow
def test_a_machine_that_is_lost_takes_its_episodes_and_the_others_play_them_again() -> None:
    from ray.cluster_utils import Cluster
    from shelves import CountingPlayer, Shelves, by_id
    from worker_worlds import Corridor

    from agentrl.rollout.collector import collect
    from agentrl.rollout.environments import EnvironmentPool
    from agentrl.rollout.play import EpisodeSpec
    from agentrl.rollout.settings import RayConfig, WorkersConfig
    from agentrl.scale.ray_environments import RayEnvironments

    specs = [EpisodeSpec(f"e{number}", "test/Corridor-v0", "8", number) for number in range(24)]
    expected = by_id(collect(specs, CountingPlayer(), EnvironmentPool(Shelves), max_active=6).episodes)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        machines = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
        heads = {machine.all_processes["raylet"][0].process.pid: machine for machine in machines}

        class Losing(CountingPlayer):
            def poll(self) -> Any:
                if len(self.rounds) == 3:
                    family = psutil.Process().children(recursive=True)
                    actor = next(each for each in family if "EnvironmentHost" in each.name())
                    cluster.remove_node(heads[actor.ppid()], allow_graceful=False)
                    actor.wait(60)  # it outlives its machine's head
                return super().poll()

        config = RayConfig(address=cluster.address, cpus=1)  # none fits where there is no CPU
        with RayEnvironments(Corridor, 6, WorkersConfig(count=1), config) as environments:
            assert len(environments._hosts) == 2
            found = collect(specs, Losing(), environments, max_active=6)
        assert by_id(found.episodes) == expected
        assert 1 <= len(found.failures) <= 6
        assert all("was lost" in str(failure.error) for failure in found.failures)
        assert environments.restarts >= 1
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["EnvironmentHost,agent.py", "raylet/raylet", "gcs_server", "ray"])
def test_a_loss_of_ray_that_cannot_be_made_good_ends_with_a_remedy(what: str, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        from contextlib import suppress
        class Losing(RandomPlayer):
            polls = 0
            def poll(self):
                self.polls += 1
                for process in psutil.Process().children(recursive=True) if self.polls == 3 else ():
                    with suppress(psutil.Error):
                        if any(name in " ".join(process.cmdline()) for name in sys.argv[1].split(",")):
                            process.kill()
                time.sleep(0.05)
                return super().poll()
        player = Losing()
        with environments() as places:
            while True:
                collect(specs, player, places, max_active=4, max_turns=50)
        """,
    )
    command = [sys.executable, str(path), what]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    said = answer.stderr.strip().splitlines()[-1]
    assert answer.returncode == 1
    assert said.startswith("agentrl.errors.ClusterLostError: Ray is lost: ")
    assert said.endswith("Then go on from the last checkpoint: agentrl train --resume RUN")
