"""One process at a time goes on with a run, and names are given out once."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import agentrl
from agentrl.errors import CheckpointError, ConfigError
from agentrl.evaluation.report import write_report
from agentrl.run.folder import create_run, open_run
from agentrl.run.lock import RunLock


def lock_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "lock.json").read_text()))


def write_lock(folder: Path, **changes: object) -> None:
    lock = RunLock(folder)
    lock.acquire()
    owner = lock_of(folder)
    lock.release()
    (folder / "lock.json").write_text(json.dumps(owner | changes))


def test_the_second_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on .* since .*wait for it"):
        second.acquire()
    second.release()
    assert lock_of(tmp_path)["pid"] == os.getpid()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second.acquire()
    second.release()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from agentrl.run.lock import RunLock
RunLock(Path({str(tmp_path)!r})).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert lock_of(tmp_path)["pid"] != os.getpid()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock_of(tmp_path)["pid"] == os.getpid()
    lock.release()


def test_a_pid_that_is_another_process_now_does_not_count(tmp_path: Path) -> None:
    write_lock(tmp_path, created=1.0)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_an_owner_on_another_machine_is_alive_while_it_touches_the_file(tmp_path: Path) -> None:
    write_lock(tmp_path, host="far", machine="far 1", pid=7)
    with pytest.raises(CheckpointError, match=r"process 7 on far .*last heartbeat.*delete .*lock\.json"):
        RunLock(tmp_path).acquire()
    past = time.time() - 3600
    os.utime(tmp_path / "lock.json", (past, past))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_check_raises_when_the_folder_is_gone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()
    (tmp_path / "lock.json").unlink()
    with pytest.raises(CheckpointError, match="was removed or replaced"):
        lock.check()


def test_of_several_that_acquire_at_once_one_succeeds(tmp_path: Path) -> None:
    def acquired(_: int) -> bool:
        try:
            RunLock(tmp_path).acquire()
        except CheckpointError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(acquired, range(16))) == 1


MAKE = """
import sys
from agentrl.run.folder import create_run
from agentrl.run.settings import load_config
config = load_config(None, f"run.folder={sys.argv[1]}")
sys.stdin.readline()
for _ in range(40):
    print(create_run(config).folder.name)
"""


def test_eighty_runs_made_at_once_have_eighty_folders(tmp_path: Path) -> None:
    """Two processes of 40 runs each."""
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    names = [name for maker in makers for name in maker.communicate()[0].split()]
    assert len(names) == len(set(names)) == 80
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all((tmp_path / name / "config.yaml").exists() for name in names)


def test_of_eighty_that_want_one_name_one_gets_it(tmp_path: Path) -> None:
    config = agentrl.load_config(None, f"run.folder={tmp_path}", "run.name=one")

    def make(_: int) -> bool:
        try:
            create_run(config)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(make, range(80))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_run_at_work_is_not_resumed_by_another_but_reported(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        "evaluation.split=test",
        "evaluation.tasks=2",
        f"run.folder={tmp_path}",
    )
    run = create_run(config)
    lock = RunLock(run.folder)
    lock.acquire()
    with pytest.raises(CheckpointError, match="in use by process"):
        agentrl.resume(run.folder, quiet=True)
    assert lock_of(run.folder)["pid"] == os.getpid()
    assert open_run(run.folder).config == config
    assert write_report(run.folder).exists()
    lock.release()
