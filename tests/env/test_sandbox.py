"""The sandbox as a tool: notebook manners, limits, errors in words, and an end to everything it started."""

import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentrl.env.sandbox import (
    LEVELS,
    PROGRAM,
    Execution,
    Limits,
    PipedServer,
    PipedSession,
    Sandbox,
    SandboxError,
    Session,
    probe,
    register_sandbox,
    sandbox_names,
)
from agentrl.env.sandbox import client as client_module
from agentrl.env.sandbox import provider as provider_module
from agentrl.env.sandbox import server as server_module
from agentrl.env.sandbox.filter import CALLS, GUARDED, READING, WRITING, filter_program
from agentrl.errors import ConfigError

WORKING = [level for level, reason in probe().items() if reason is None]
pytestmark = pytest.mark.skipif(not WORKING, reason=f"no isolation here: {probe()}")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if request.param not in WORKING:
        pytest.skip(str(probe()[request.param]))
    limits = Limits(seconds=20, cpu_seconds=0.5, output_chars=100)
    with Sandbox(isolation=request.param, limits=limits) as sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox: Sandbox) -> Iterator[Session]:
    with sandbox.session() as session:
        yield session


def eventually(claim: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not claim() and time.monotonic() < end:
        time.sleep(0.01)
    return claim()


def running(pid: int) -> bool:
    """Not for an orphan that only waits for its new parent to look at it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def servers(parent: int) -> list[int]:
    """Processes that run a sandbox's server for `parent`, or did."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if "agentrl.env.sandbox.server" in (folder / "cmdline").read_text():
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                found += [int(folder.name)] if int(stat[1]) == parent else []
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx", "3\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("None", ""),
        ("x = 5", ""),
        ("", ""),
        ("import sys\nprint('err', file=sys.stderr)\nprint('out')", "err\nout\n"),
        ("import os\nprint('a')\nn = os.write(1, b'b')", "a\nb"),
        ("def f(n):\n    return n * 2\nf(4)", "8\n"),
        ("print('ünïcode ∑')", "ünïcode ∑\n"),
        ("exit()", ""),
    ],
)
def test_code_answers_like_a_notebook(session: Session, code: str, output: str) -> None:
    assert session.run(code) == Execution(output, None, "ok")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1\n1/0", "ZeroDivisionError: division by zero (line 2)"),
        ("x = (", "SyntaxError: '(' was never closed (line 1)"),
        ("def f():\n    return y\n\nf()", "NameError: name 'y' is not defined (line 2)"),
        (
            "import json\n\njson.loads('x')",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (line 3)",
        ),
        ("raise ValueError", "ValueError (line 1)"),
        ("raise SystemExit('enough')", "SystemExit: enough (line 1)"),
        ("input()", "EOFError: EOF when reading a line (line 1)"),
        ("b = bytearray(4 << 30)", "needed more than 1024 MB (line 1)"),
        ("while True: print('x' * 1000)", "printed or wrote more than 1 MB (line 1)"),
        (
            "class E(Exception):\n    def __str__(self): 1/0\nraise E",
            "E: its message cannot be shown (line 3)",
        ),
        ("\0", "source code string cannot contain null bytes"),
        ("\ud800 = 1", "invalid syntax (line 1)"),
    ],
)
def test_an_error_is_one_line_with_its_place(session: Session, code: str, error: str) -> None:
    execution = session.run(code)
    assert execution.ended == "error"
    assert execution.error is not None
    assert execution.error.endswith(error)
    assert "\n" not in execution.error


def test_a_session_keeps_its_variables_and_shares_none(sandbox: Sandbox) -> None:
    with sandbox.session() as one, sandbox.session() as other:
        one.run("x = 1")
        one.run("import math\nmath.pi = 3\n1/0")
        assert one.run("x, math.pi").output == "(1, 3)\n"
        assert other.run("x").error == "NameError: name 'x' is not defined (line 1)"
        assert other.run("import math\nmath.pi > 3").output == "True\n"


def test_long_output_keeps_its_head_and_its_tail(session: Session) -> None:
    output = session.run("print('a' * 200 + 'b' * 200)").output
    assert output == "a" * 50 + "\n[… 301 characters cut …]\n" + "b" * 49 + "\n"


def test_output_up_to_a_crash_is_kept(session: Session) -> None:
    execution = session.run("import os\nprint('so far')\nos._exit(3)")
    error = "the process ended itself (exit status 3); all variables are lost"
    assert execution == Execution("so far\n", error, "killed")


def test_too_much_processor_time_ends_the_process_and_the_next_execution_starts_anew(
    session: Session,
) -> None:
    session.run("x = 1")
    late = session.run("print('begun')\nwhile True: pass")
    error = "used more than 0.5 s of processor time; all variables are lost"
    assert late == Execution("begun\n", error, "timeout")
    assert session.run("x").error == "NameError: name 'x' is not defined (line 1)"
    assert session.run("x = 2\nx").output == "2\n"


def test_too_much_time_on_the_clock_ends_the_process() -> None:
    with Sandbox(limits=Limits(seconds=0.3)) as sandbox, sandbox.session() as session:
        error = "took longer than 0.3 s; all variables are lost"
        assert session.run("import time\ntime.sleep(60)") == Execution("", error, "timeout")


def test_a_process_that_never_answers_is_not_waited_for() -> None:
    with Sandbox(limits=Limits(seconds=0.3)) as sandbox, sandbox.session() as session:
        code = "import os\ndef spin(*_):\n    while True: pass\nos.write = spin"
        assert session.run(code).ended == "timeout"
        assert session.run("1").output == "1\n"


def test_threads_left_behind_use_up_the_time_of_the_next_execution() -> None:
    if "namespaces" not in WORKING:
        pytest.skip(str(probe()["namespaces"]))
    limits = Limits(seconds=20, cpu_seconds=0.3)
    with Sandbox(isolation="namespaces", limits=limits) as sandbox, sandbox.session() as session:
        code = "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()"
        session.run(code)
        assert session.run("import time\ntime.sleep(15)").ended == "timeout"


def test_the_same_code_prints_the_same_in_every_process() -> None:
    code = "import random\nprint(random.random(), {'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    outputs = set()
    for _ in range(2):
        with Sandbox() as sandbox:
            for _ in range(2):
                with sandbox.session() as session:
                    outputs.add(session.run(code).output)
    assert len(outputs) == 1


def test_nothing_of_this_process_is_inherited(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRL_SECRET", "kept")
    assert session.run("import os\n'AGENTRL_SECRET' in os.environ").output == "False\n"
    code = """
import os
found = []
for number in range(64):
    try: os.fstat(number)
    except OSError: continue
    found.append(number)
found
"""
    assert session.run(code).output == "[0, 1, 2, 3]\n"  # nothing, the output twice, the channel


def test_sessions_meet_neither_in_files_nor_by_signals() -> None:
    if "namespaces" not in WORKING:
        pytest.skip(str(probe()["namespaces"]))
    with Sandbox(isolation="namespaces") as sandbox, sandbox.session() as one, sandbox.session() as other:
        assert one.run("open('/tmp/note', 'w').write('hello')").output == "5\n"
        assert other.run("import os\nos.listdir('/tmp'), os.getpid()").output == "([], 1)\n"
        assert one.run("open('/tmp/note').read()").output == "'hello'\n"


def test_only_what_was_imported_can_be_read() -> None:
    if "namespaces" not in WORKING:
        pytest.skip(str(probe()["namespaces"]))
    look = (
        "import os\n[name for name in ('numpy', 'gymnasium') if os.path.exists(os.path.join(FOLDER, name))]"
    )
    folder = Path(pytest.importorskip("numpy").__file__).parents[1]
    for imports, found in ((("math",), "[]\n"), (("math", "numpy"), "['numpy']\n")):
        with Sandbox(isolation="namespaces", imports=imports) as sandbox, sandbox.session() as session:
            assert session.run(look.replace("FOLDER", repr(str(folder)))).output == found


@pytest.mark.parametrize("level", LEVELS)
def test_named_packages_can_be_used(level: str) -> None:
    if level not in WORKING:
        pytest.skip(str(probe()[level]))
    pytest.importorskip("numpy")
    with Sandbox(isolation=level, imports=("numpy",)) as sandbox, sandbox.session() as session:
        assert (
            session.run("import numpy as np\nnp.linalg.det(np.eye(3) * 2)").output
            == "np.float64(7.999999999999998)\n"
        )


@pytest.mark.parametrize("level", LEVELS)
def test_a_module_beside_the_temporary_files_can_be_used(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level not in WORKING:
        pytest.skip(str(probe()[level]))
    tmp_path.chmod(0o755)
    (tmp_path / "agentrl_test_tool").mkdir()
    (tmp_path / "agentrl_test_tool" / "__init__.py").write_text(
        "from agentrl_test_single import n\nm = n + 1"
    )
    (tmp_path / "agentrl_test_tool" / "later.py").write_text("k = 4")
    (tmp_path / "agentrl_test_single.py").write_text("n = 2")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(isolation=level, imports=("agentrl_test_tool",)) as sandbox, sandbox.session() as session:
        assert session.run("import agentrl_test_tool as t\nt.m").output == "3\n"
        if level != "seccomp":
            assert session.run("import agentrl_test_tool.later\nt.later.k").output == "4\n"
        if level == "namespaces":
            assert session.run("import tempfile\ntempfile.TemporaryFile().write(b'abc')").output == "3\n"


def test_constructing_starts_nothing_and_closing_ends_everything() -> None:
    before = set(servers(os.getpid()))
    sandbox = Sandbox()
    assert set(servers(os.getpid())) == before
    session = sandbox.session()
    assert len(set(servers(os.getpid())) - before) == 1
    session.close()
    session.close()
    sandbox.close()
    sandbox.close()
    assert set(servers(os.getpid())) == before
    with sandbox.session() as again:
        assert again.run("1").ended == "ok"
    sandbox.close()
    assert set(servers(os.getpid())) == before


def test_a_forgotten_sandbox_ends_with_its_last_reference() -> None:
    before = set(servers(os.getpid()))
    sandbox = Sandbox()
    sandbox.session().close()
    del sandbox
    assert set(servers(os.getpid())) == before


def test_a_closed_session_is_refused(sandbox: Sandbox) -> None:
    session = sandbox.session()
    session.close()
    with pytest.raises(SandboxError, match="this session is closed"):
        session.run("1")


def test_eight_threads_work_at_once(sandbox: Sandbox) -> None:
    def work(number: int) -> list[str]:
        outputs = []
        for _ in range(4):
            with sandbox.session() as session:
                session.run(f"x = {number}")
                outputs += [session.run("x * 10").output for _ in range(10)]
        return outputs

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[f"{number * 10}\n"] * 40 for number in range(8)]


def test_a_dead_server_is_an_error_of_ours_and_is_replaced() -> None:
    before = set(servers(os.getpid()))
    with Sandbox() as sandbox:
        session = sandbox.session()
        (server,) = set(servers(os.getpid())) - before
        child = session._child._pid if session._child else 0
        assert running(child)
        os.kill(server, signal.SIGKILL)
        assert eventually(lambda: not running(child))
        with pytest.raises(SandboxError, match="server died"):
            session.run("import time\ntime.sleep(20)")
        session.close()
        with sandbox.session() as after:
            assert after.run("1 + 1").output == "2\n"
        (other,) = set(servers(os.getpid())) - before
        assert other != server


def test_a_fork_of_this_process_gets_a_server_of_its_own() -> None:
    with Sandbox() as sandbox, sandbox.session() as session:
        session.run("x = 1")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with sandbox.session() as mine:
                    status = int(mine.run("2 + 2").output != "4\n")
                sandbox.close()
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert session.run("x").output == "1\n"
        with sandbox.session() as after:
            assert after.run("3").output == "3\n"


@pytest.mark.parametrize("level", LEVELS)
def test_everything_ends_with_a_killed_parent(level: str) -> None:
    if level not in WORKING:
        pytest.skip(str(probe()[level]))
    code = f"""
import sys
from agentrl.env.sandbox import Sandbox
session = Sandbox(isolation={level!r}).session()
session.run("1")
print(session._child._pid, flush=True)
session.run("import time; time.sleep(4)")
session.run("import time; time.sleep(60)")
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        (server,) = servers(parent.pid)
        assert running(child)
        parent.kill()
    assert eventually(lambda: not running(child) and not running(server))


@pytest.mark.parametrize("level", WORKING)
def test_no_process_descriptor_or_file_is_left(
    level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    with Sandbox(isolation=level, limits=Limits(seconds=0.2)) as sandbox:
        for code in ("1", "import os\nos._exit(1)", "import time\ntime.sleep(9)"):
            with sandbox.session() as session:
                pid = session._child and session._child._pid
                session.run(code)
                session.run("1")
            assert not Path(f"/proc/{pid}").exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert os.listdir(tmp_path) == []


def test_auto_takes_the_first_level_that_works() -> None:
    with Sandbox() as sandbox:
        assert sandbox.isolation == WORKING[0]


def test_without_isolation_it_refuses_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(level: str, *_: object) -> None:
        raise SandboxError(f"no {level} today")

    monkeypatch.setattr(client_module, "_launch", fail)
    with pytest.raises(SandboxError) as refused:
        Sandbox().session()
    for level in LEVELS:
        assert f"{level}: no {level} today" in str(refused.value)
    assert "isolation='none'" in str(refused.value)


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"isolation 'bublewrap' is unknown; did you mean 'bubblewrap'"):
        Sandbox(isolation="bublewrap")
    with pytest.raises(ConfigError, match="require_isolation is True"):
        Sandbox(isolation="none")
    with pytest.raises(ConfigError, match=r"limits\.seconds is 0, not a number above 0"):
        Limits(seconds=0)
    with pytest.raises(ConfigError, match=r"limits\.memory_mb is 0\.5, not a whole number above 0"):
        Limits(memory_mb=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"imports is 'math', wanted a list"):
        Sandbox(imports="math")
    with pytest.raises(ConfigError, match=r"imports: .*No module named 'nowhere'"):
        Sandbox(imports=("nowhere",)).session()


def test_it_works_for_a_user_without_rights() -> None:
    """As root: with the interpreter where that user can reach it, in a mount namespace of its own."""
    if os.geteuid() != 0 or "namespaces" not in WORKING:
        pytest.skip("not root: then all other tests prove it; or no namespaces")
    code = """
from agentrl.env.sandbox import Sandbox, probe
assert probe()["namespaces"] is None, probe()
with Sandbox(isolation="namespaces") as sandbox, sandbox.session() as session:
    print(session.run("import os\\nos.getuid(), os.getpid(), os.path.exists('/etc/passwd'), 6 * 7").output)
"""
    python, root = Path(sys.executable).resolve(), Path(__file__).parents[2]
    # Both the interpreter and the packages may lie in folders that are closed to others, as root's home is.
    script = (
        'mount --bind "$1" /mnt && mount --bind "$2" /opt && '
        'exec setpriv --reuid 65533 --regid 65533 --clear-groups "/mnt/$3" -c "$4"'
    )
    inside = str(python.relative_to(sys.base_prefix))
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.base_prefix, str(root), inside, code]
    paths = [path.replace(str(root), "/opt", 1) for path in (str(root), *sys.path) if path]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "(65534, 1, False, 42)", done.stderr


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_knows_the_numbers_of_the_kernel_headers(machine: str, column: int) -> None:
    places = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    if not places[machine].exists():
        pytest.skip(f"no {places[machine]}")
    text = places[machine].read_text()
    numbers = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", text))
    shared = dict(re.findall(r"#define __NR3264_(\w+)\s+(\d+)", text))
    for alias, name in re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text):
        if name in shared:
            numbers.setdefault(alias, shared[name])
    for name, pair in (CALLS | READING | WRITING | GUARDED).items():
        expected = pair[column]
        assert numbers.get(name) == (None if expected is None else str(expected)), name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("files", ["write", "read", "none"])
def test_every_jump_of_the_filter_lands_within_it(machine: str, files: str) -> None:
    program = filter_program(files=files, threads=True, machine=machine)
    assert len(program) < 4096
    for place, (code, if_true, if_false, _) in enumerate(program):
        assert max(if_true, if_false) < 256
        if code in (0x15, 0x35, 0x45):
            assert place + 1 + max(if_true, if_false) < len(program)
    with pytest.raises(OSError, match="no system call filter for riscv64"):
        filter_program(files=files, threads=True, machine="riscv64")


# What is not to be read, and what is not to run.


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "seccomp"])
def test_no_package_of_another_python_can_be_read(level: str) -> None:
    if level not in WORKING:
        pytest.skip(str(probe()[level]))
    look = """
import os
[os.path.join(here, name) for top in ('/lib', '/lib64', '/usr') for here, _, names in os.walk(top)
 for name in names if name.endswith('.py') and not here.startswith(OURS)]
"""
    ours = repr((sys.base_prefix, os.path.dirname(os.__file__)))
    with Sandbox(isolation=level) as sandbox, sandbox.session() as session:
        assert session.run(look.replace("OURS", ours)).output == "[]\n"


def test_folders_of_other_pythons_are_found_among_shared_libraries(tmp_path: Path) -> None:
    for folder in (
        "python3/dist-packages",
        "python3.9/json",
        "pypy3",
        "x/y/site-packages",
        "a/b/c/d/e",
        "ours",
    ):
        (tmp_path / folder).mkdir(parents=True)
    ours = tmp_path / "python3.11" / "lib-dynload"
    (ours.parent / "site-packages").mkdir(parents=True)
    ours.mkdir()
    found = server_module._other_pythons(str(tmp_path), [str(ours.parent), str(ours)])
    named = {os.path.relpath(path, tmp_path) for path in found}
    assert named == {"python3", "python3.9", "pypy3", "x/y/site-packages", "python3.11/site-packages"}


@pytest.mark.skipif(sys.platform != "linux", reason="a process is stopped by its descriptor")
def test_what_code_leaves_running_stands_still_between_executions(session: Session) -> None:
    if session._sandbox.isolation not in ("namespaces", "none"):
        pytest.skip("it may start no threads")
    code = "import threading\ncount = 0\ndef spin():\n    global count\n    while True: count += 1\n"
    assert session.run(f"{code}threading.Thread(target=spin, daemon=True).start()").ended == "ok"
    assert session._child is not None
    child: Any = session._child
    assert eventually(lambda: psutil.Process(child._pid).status() == psutil.STATUS_STOPPED)
    used = child._cpu()
    time.sleep(0.5)
    assert (
        child._cpu() - used < 0.1
    )  # a thread that went on would have had 0.5; each stops a moment after the first
    assert session.run("before = count\nimport time\ntime.sleep(0.05)\ncount > before").output == "True\n"


# Providers of others.


class Elsewhere:
    """Runs code in a plain process: no isolation at all, but all of the protocol."""

    why: str | None = None
    started = 0

    def available(self) -> str | None:
        return self.why

    def start(self, *, limits: Limits, imports: Sequence[str]) -> PipedServer:
        type(self).started += 1
        command = [sys.executable, "-I", "-c", PROGRAM]
        return PipedServer(lambda: PipedSession(command, limits, imports))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Elsewhere]:
    """Offered by a distribution that is installed."""
    metadata = tmp_path / "somebody-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[agentrl.sandboxes]\nelsewhere = somebody_sandbox:Elsewhere\nbroken = somebody_sandbox:Nothing\n"
    )
    module = types.ModuleType("somebody_sandbox")
    module.Elsewhere = Elsewhere  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody_sandbox", module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(provider_module, "_registered", dict(provider_module._registered))
    monkeypatch.setattr(Elsewhere, "started", 0)
    return Elsewhere


def test_a_distribution_can_provide_a_sandbox(elsewhere: type[Elsewhere]) -> None:
    limits = Limits(seconds=5, output_chars=10, file_mb=1)
    with Sandbox(isolation="elsewhere", imports=("math",), limits=limits) as sandbox:
        assert sandbox.isolation == "elsewhere"
        with sandbox.session() as session, sandbox.session() as other:
            assert session.run("x = 6 * 7\nx").output == "42\n"
            assert other.run("x") == Execution("", "NameError: name 'x' is not defined (line 1)", "error")
            assert session.run("print('a' * 30)").output == "aaaaa\n[… 21 characters cut …]\naaaa\n"
            assert session.run("import os\nos._exit(3)").ended == "killed"
            assert session.run("'x' in globals()").output == "False\n"  # begun anew
            assert session.run("print('a' * (2 << 20))").ended == "killed"
            assert session.run("import sys\nsys.exit()") == Execution("", None, "ok")
        assert elsewhere.started == 1
        with pytest.raises(SandboxError, match="this session is closed"):
            session.run("1")
    with Sandbox(isolation="elsewhere", limits=Limits(seconds=0.3)) as sandbox, sandbox.session() as session:
        error = "took longer than 0.3 s; all variables are lost"
        assert session.run("while True: pass") == Execution("", error, "timeout")


def test_a_provider_that_is_not_there_says_why(
    elsewhere: type[Elsewhere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "why", "no containers today")
    with pytest.raises(SandboxError, match="elsewhere: no containers today"):
        Sandbox(isolation="elsewhere").session()
    assert elsewhere.started == 0
    with pytest.raises(ConfigError, match=r"sandbox 'broken' \(somebody_sandbox:Nothing\): AttributeError"):
        Sandbox(isolation="broken").session()
    with pytest.raises(ConfigError, match=r"isolation 'elswhere' is unknown; did you mean 'elsewhere'"):
        Sandbox(isolation="elswhere")
    monkeypatch.setattr(elsewhere, "why", None)
    with pytest.raises(ConfigError, match="imports: ModuleNotFoundError: No module named 'nowhere'"):
        Sandbox(isolation="elsewhere", imports=("nowhere",)).session()


def test_the_names_of_ours_are_taken_and_auto_means_ours(elsewhere: type[Elsewhere]) -> None:
    assert sandbox_names() == [*LEVELS, "broken", "elsewhere"]
    for name in (*LEVELS, "auto", "none"):
        with pytest.raises(ConfigError, match=f"sandbox '{name}' is registered already"):
            register_sandbox(name, Elsewhere)
    with Sandbox() as sandbox:
        assert sandbox.isolation == WORKING[0]


def test_the_container_that_is_shown_to_contributors_works(
    examples: dict[str, types.ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = tmp_path / "docker"  # runs here what it is to run in a container
    docker.write_text(
        f'''#!/bin/sh
echo "$@" | head -n 1 | cut -c 1-400 >> {tmp_path}/asked
[ "$1" = rm ] && exit
while [ "$1" != python ]; do shift; done
shift; exec {sys.executable} "$@"'''
    )
    docker.chmod(0o755)
    monkeypatch.setattr(provider_module, "_registered", dict(provider_module._registered))
    register_sandbox("docker", examples["containers"].Docker)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Sandbox(isolation="docker", imports=("math",)) as sandbox, sandbox.session() as session:
        assert session.run("import math\nmath.comb(6, 3)").output == "20\n"
    asked = (tmp_path / "asked").read_text()
    assert asked.count("--network=none --read-only --cap-drop=ALL") == 2  # the proof and the session
    assert len(set(re.findall(r"^rm --force (agentrl-\w{32})$", asked, re.M))) == 2
