"""Attacks on the sandbox: each one works without isolation, and none works within it.

They are bounded, so that a working one harms nothing: counted forks, megabytes and bytes, writing to the
test's own folder, sockets on the loopback device, signals to a process that waits for them.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentrl.env.sandbox import LEVELS, Execution, Limits, Sandbox, Session, probe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation needs Linux")

SECRET = "kept from the model"
WIDE = Limits(seconds=20, cpu_seconds=20, memory_mb=4096, file_mb=64, open_files=512, threads=256)
TIGHT = Limits(seconds=1.5, cpu_seconds=0.25, memory_mb=128, file_mb=1, open_files=32, threads=8)


@dataclass(frozen=True)
class World:
    """What there is to attack: FOLDER, SECRET_FILE, PORT, HOME and so on in the code of an attack."""

    folder: Path
    listener: socket.socket
    victim: subprocess.Popen[bytes]

    def aim(self, code: str) -> str:
        for name, value in (
            ("SECRET_FILE", str(self.folder / "secret")),
            ("FOLDER", str(self.folder)),
            ("PORT", str(self.listener.getsockname()[1])),
            ("HOME", str(Path.home())),
            ("ENTRIES", repr(set(os.listdir(Path.home())))),
            ("VICTIM", str(self.victim.pid)),
            ("ADDRESS", "0x" + Path(f"/proc/{self.victim.pid}/maps").read_text().partition("-")[0]),
        ):
            code = code.replace(name, value)
        return code


def escaped(execution: Execution, world: World) -> bool:
    return "ESCAPED" in execution.output


def leaked(execution: Execution, world: World) -> bool:
    return SECRET in execution.output


def wrote(execution: Execution, world: World) -> bool:
    return (world.folder / "written").exists()


def hit(execution: Execution, world: World) -> bool:
    try:
        return world.victim.wait(0.3) == -15
    except subprocess.TimeoutExpired:
        return False


def outlived(execution: Execution, world: World) -> bool:
    time.sleep(0.6)
    return wrote(execution, world)


def unbounded(execution: Execution, world: World) -> bool:
    return execution.ended == "ok"


@dataclass(frozen=True)
class Attack:
    """Code, and how to see that it worked.

    `filtered`: of "namespaces", only the filter stops it. `rooted`: it works for root only.
    """

    name: str
    code: str
    worked: Callable[[Execution, World], bool] = escaped
    filtered: bool = False
    rooted: bool = False


ATTACKS = [
    Attack(
        "fork bomb",
        """
import os, time
for _ in range(30):
    if os.fork() == 0:
        time.sleep(0.2)
        os._exit(0)
print("ESCAPED")
""",
    ),
    Attack(
        "thread bomb",
        """
import threading
stop = threading.Event()
for _ in range(40):
    threading.Thread(target=stop.wait, args=(5,), daemon=True).start()
stop.set()
print("ESCAPED")
""",
    ),
    Attack("memory", "block = bytearray(200 << 20)\nprint('ESCAPED')"),
    Attack("shared memory", "import mmap\nblock = mmap.mmap(-1, 200 << 20)\nprint('ESCAPED')"),
    Attack(
        "memory in small pieces",
        "pieces = [bytes(1 << 20) for _ in range(200)]\nprint('ESCAPED', len(pieces))",
    ),
    Attack(
        "memory outside the address space",
        """
import ctypes, os
for number in range(20):
    file = os.memfd_create("hidden")
    for _ in range(20):
        os.write(file, bytes(1 << 20))
print("ESCAPED")
""",
    ),
    Attack(
        "memory in the folder",
        """
import os, tempfile
with tempfile.TemporaryDirectory() as folder:
    for number in range(8):
        with open(f"{folder}/{number}", "wb") as file:
            file.write(bytes(900_000))
print("ESCAPED")
""",
    ),
    Attack("print flood", "for _ in range(8):\n    print('x' * (1 << 20))", unbounded),
    Attack("print flood in short lines", "for number in range(400_000):\n    print(number)", unbounded),
    Attack(
        "flood below print", "import os\nfor _ in range(8):\n    os.write(2, b'x' * (1 << 20))", unbounded
    ),
    Attack(
        "endless loop",
        """
import time
while time.process_time() < 0.7:
    try:
        while time.process_time() < 0.7: pass
    except BaseException: pass
print("ESCAPED")
""",
    ),
    Attack(
        "unkillable sleep",
        """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
for number in {*range(1, 32)} - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
time.sleep(2)
print("ESCAPED")
""",
    ),
    Attack("huge int", "import time\nwhile time.process_time() < 0.7: 3**2_000_000\nprint('ESCAPED')"),
    Attack(
        "slow regular expression",
        """
import re, time
while time.process_time() < 0.7:
    re.match("(a+)+$", "a" * 20 + "b")
print("ESCAPED")
""",
    ),
    Attack("file written outside", "open('FOLDER/written', 'w').write('x')", wrote),
    Attack("file removed", "import os\nos.rename('SECRET_FILE', 'FOLDER/written')", wrote),
    Attack("secret file", "print(open('SECRET_FILE').read())", leaked),
    Attack("secret by way of ..", "print(open('../../../../../../..SECRET_FILE').read())", leaked),
    Attack("secret by way of /proc", "print(open('/proc/self/root/SECRET_FILE').read())", leaked),
    Attack(
        "secret by symbolic link",
        """
import os, tempfile
link = tempfile.mktemp()
os.symlink('SECRET_FILE', link)
try:
    print(open(link).read())
finally:
    os.unlink(link)
""",
        leaked,
    ),
    Attack("secret by hard link", "import os\nos.link('SECRET_FILE', 'FOLDER/written')", wrote),
    Attack("folder listed", "import os\nprint('ESCAPED' if 'secret' in os.listdir('FOLDER') else '')"),
    Attack("this repository", f"print('ESCAPED' if len(open({__file__!r}).read()) > 1000 else '')"),
    Attack("home", "import os\nprint('ESCAPED' if set(os.listdir('HOME')) == ENTRIES else '')"),
    Attack("host's accounts", "print('ESCAPED' if 'root' in open('/etc/passwd').read() else '')"),
    Attack(
        "standard library changed",
        "import os\nopen(os.__file__, 'r+b').close()\nprint('ESCAPED')",
        rooted=True,
    ),
    Attack("another process's environment", "print(open('/proc/VICTIM/environ').read())", leaked),
    Attack("list of processes", "import os\nprint('ESCAPED' if '1' in os.listdir('/proc') else '')"),
    Attack(
        "memory of the server", "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').close()\nprint('ESCAPED')"
    ),
    Attack("signal to the parent", "import os\nos.kill(os.getppid() or 1 << 22, 0)\nprint('ESCAPED')"),
    Attack("signal to another process", "import os\nos.kill(VICTIM, 15)", hit),
    Attack("signal to everything", "import os\nos.kill(-1, 0)\nprint('ESCAPED')"),
    Attack(
        "signal through a pipe's owner",
        """
import fcntl, os, signal
out, into = os.pipe()
fcntl.fcntl(out, fcntl.F_SETOWN, VICTIM)
fcntl.fcntl(out, 10, signal.SIGTERM)
fcntl.fcntl(out, fcntl.F_SETFL, os.O_ASYNC)
os.write(into, b"x")
""",
        hit,
    ),
    Attack(
        "ptrace",
        """
import ctypes
libc = ctypes.CDLL(None)
if libc.ptrace(0x4206, VICTIM, None, None) == 0:
    print("ESCAPED")
""",
    ),
    Attack(
        "another process's memory",
        """
import ctypes
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
found = ctypes.create_string_buffer(4)
here, there = Part(ctypes.addressof(found), 4), Part(ADDRESS, 4)
ctypes.CDLL(None).process_vm_readv(VICTIM, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print("ESCAPED" if found.raw == b"\\x7fELF" else "")
""",
    ),
    Attack(
        "TCP to the host",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).close()\nprint('ESCAPED')",
    ),
    Attack(
        "UDP to the host",
        "import socket\nsocket.socket(type=2).sendto(b'x', ('127.0.0.1', PORT))\nprint('ESCAPED')",
    ),
    Attack(
        "Unix socket without a file",
        "import socket\nsocket.socket(1).connect('\\0agentrl-escape-PORT')\nprint('ESCAPED')",
    ),
    Attack(
        "network device opened",
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nprint('ESCAPED')",
        filtered=True,
    ),
    Attack("shell", "import os\nos.system('echo x > FOLDER/written')", wrote),
    Attack(
        "program",
        """
import os
os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "echo x > FOLDER/written"], {}), 0)
""",
        wrote,
    ),
    Attack(
        "daemon that outlives the session",
        """
import os, time
pid = os.fork()
if pid == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.4)
        open("FOLDER/written", "w").close()
    os._exit(0)
os.waitpid(pid, 0)
""",
        outlived,
    ),
    Attack("many open files", "import os\nfiles = [os.dup(0) for _ in range(300)]\nprint('ESCAPED')"),
    Attack(
        "root again",
        "import os\nos.setuid(0)\nprint('ESCAPED' if os.access('/', os.W_OK) else '')",
        rooted=True,
    ),
    Attack(
        "namespaces of its own",
        "import ctypes\nprint('ESCAPED' if ctypes.CDLL(None).unshare(0x10000000) == 0 else '')",
        filtered=True,
    ),
    Attack(
        "memory shared with others by name",
        """
import os
open("/dev/shm/agentrl-escape-PORT", "w").close()
os.unlink("/dev/shm/agentrl-escape-PORT")
print("ESCAPED")
""",
    ),
    Attack(
        "System V shared memory",
        """
import ctypes
libc = ctypes.CDLL(None)
number = libc.shmget(0, 1000, 0o1600)
if number != -1:
    libc.shmctl(number, 0, None)
    print("ESCAPED")
""",
        filtered=True,
    ),
    Attack("device opened", "open('/dev/null', 'w').write('x')\nprint('ESCAPED')"),
]


@pytest.fixture(scope="module")
def services() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as unnamed:
        unnamed.bind(f"\0agentrl-escape-{listener.getsockname()[1]}")
        unnamed.listen()
        yield listener


@pytest.fixture(scope="module")
def victims() -> Iterator[list[subprocess.Popen[bytes]]]:
    """The last one lives, or is replaced before the next attack."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for victim in started:
        victim.kill()
        victim.wait()


@pytest.fixture
def world(tmp_path: Path, services: socket.socket, victims: list[subprocess.Popen[bytes]]) -> World:
    (tmp_path / "secret").write_text(SECRET)
    if not victims or victims[-1].poll() is not None:
        environment = {"PASSWORD": SECRET, "PATH": "/usr/bin:/bin"}
        victims.append(subprocess.Popen(["sleep", "600"], env=environment))
    return World(tmp_path, services, victims[-1])


LAYERS = (*LEVELS, "namespaces without the filter")
IMPORTS = ("ctypes", "fcntl", "math", "mmap", "os", "re", "resource", "signal", "socket", "tempfile", "time")


@pytest.fixture(scope="module")
def sandboxes() -> Iterator[dict[str, tuple[Sandbox, Session]]]:
    """A sandbox per layer, each with a session that stays open beside all attacks."""
    opened: dict[str, tuple[Sandbox, Session]] = {}
    for layer in LAYERS:
        level = layer.split()[0]
        if probe()[level] is None:
            sandbox = Sandbox(isolation=level, limits=TIGHT, imports=IMPORTS)
            sandbox._settings["filter"] = layer == level
            opened[layer] = (sandbox, sandbox.session())
            opened[layer][1].run("x = 41")
    yield opened
    for sandbox, _ in opened.values():
        sandbox.close()


@pytest.fixture(scope="module")
def unsafe() -> Iterator[Sandbox]:
    with Sandbox(isolation="none", require_isolation=False, limits=WIDE, imports=()) as sandbox:
        yield sandbox


def names(attack: Attack) -> str:
    return attack.name.replace(" ", "-")


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_the_attack_works_without_isolation(attack: Attack, world: World, unsafe: Sandbox) -> None:
    if attack.rooted and os.geteuid() != 0:
        pytest.skip("it works for root only")
    with unsafe.session() as session:
        execution = session.run(world.aim(attack.code))
    assert attack.worked(execution, world), execution


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_the_attack_fails_in_the_sandbox(
    attack: Attack, layer: str, world: World, sandboxes: dict[str, tuple[Sandbox, Session]]
) -> None:
    if layer not in sandboxes:
        pytest.skip(str(probe()[layer.split()[0]]))
    if attack.filtered and layer not in LEVELS:
        pytest.skip("only the filter stops it, and without the filter it harms nobody outside")
    sandbox, witness = sandboxes[layer]
    with sandbox.session() as session:
        execution = session.run(world.aim(attack.code))
    assert not attack.worked(execution, world), execution
    assert witness.run("x + 1") == Execution("42\n", None, "ok")
    with sandbox.session() as after:
        assert after.run("import math\nmath.factorial(5)") == Execution("120\n", None, "ok")


RUINS = {
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x)
""",
    "null pointer": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "exit": "import os\nos._exit(0)",
    "every descriptor closed": "import os\nos.closerange(0, 256)",
    "garbage as an answer": "import os\nos.write(3, b'\\x00\\x00\\x00\\x05hello')",
    "endless answer": "import os\nos.write(3, b'\\xff' * 4)\nwhile True: os.write(3, b'x' * 4096)",
    "deeply nested answer": "import os\nos.write(3, b'\\x00\\x00\\xff\\xff' + b'[' * 65535)",
    "answer of the wrong shape": "import os\nos.write(3, b'\\x00\\x00\\x00\\x04[{}]')",
    "answer to another question": 'import os\nbody = b\'{"number": 7, "error": null}\'\n'
    "os.write(3, bytes([0, 0, 0, len(body)]) + body)",
    "server patched": "import agentrl.env.sandbox.server as server\nserver._execute = server._frame = None",
    "builtins patched": "import builtins\nbuiltins.len = builtins.isinstance = builtins.compile = None",
}


@pytest.mark.parametrize("layer", ["none", *LEVELS])
def test_what_ruins_its_own_process_harms_no_other(layer: str) -> None:
    if probe().get(layer) is not None:
        pytest.skip(str(probe()[layer]))
    with (
        Sandbox(isolation=layer, require_isolation=False, limits=TIGHT, imports=IMPORTS) as sandbox,
        sandbox.session() as witness,
    ):
        witness.run("x = 41")
        for name, code in RUINS.items():
            with sandbox.session() as session:
                session.run("kept = 1")
                assert session.run(code).ended != "ok", name
                session.run("1")
            assert witness.run("x + 1") == Execution("42\n", None, "ok"), name
            with sandbox.session() as after:
                assert after.run("len([1, 2])") == Execution("2\n", None, "ok"), name


def test_there_are_at_least_25_attacks() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 25
