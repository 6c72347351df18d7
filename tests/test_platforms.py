"""Every module can be imported on macOS, and Windows is refused in one line."""

import subprocess
import sys

import pytest

# Names that the standard library has on Linux alone, or that macOS has only from Python 3.13 on.
MACOS = """
import importlib, os, pkgutil, resource, select, signal, socket, sys

# What others do about the platform is theirs to know: they are imported as they are here.
import gymnasium, matplotlib.figure, psutil, pyarrow.parquet, rich.console, scipy.stats
import torch, transformers, typer
for name in ("math_verify", "nltk", "peft", "rapidfuzz", "ray", "starlette", "uvicorn"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass

absent = {
    os: ["waitid", "P_PID", "P_PGID", "P_ALL", "WEXITED", "WNOWAIT", "WSTOPPED", "sched_getaffinity",
         "sched_setaffinity", "unshare", "setns", "memfd_create", "MFD_CLOEXEC", "pidfd_open", "eventfd",
         "splice", "copy_file_range", "getrandom", "setresuid", "setresgid", "getresuid", "pipe2",
         "posix_fadvise", "posix_fallocate",
         "CLONE_NEWUSER", "O_TMPFILE", "O_PATH", "O_DIRECT", "getxattr", "setxattr"],
    signal: ["sigtimedwait", "sigwaitinfo", "pidfd_send_signal", "SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGPOLL"],
    resource: ["prlimit", "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_MSGQUEUE"],
    select: ["epoll", "EPOLLIN"],
    socket: ["AF_NETLINK", "AF_PACKET", "SO_PEERCRED", "SOCK_CLOEXEC", "SOCK_NONBLOCK"],
}
for module, names in absent.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "darwin"

import agentrl, agentrl_envs
count = 0
for package in (agentrl, agentrl_envs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                assert error.name.partition(".")[0] in ("ray", "starlette", "uvicorn", "vllm"), module.name
            count += 1
print(count)

from agentrl.env.sandbox import Limits
from agentrl.env.sandbox.process import SandboxError, ServerProcess
try:
    ServerProcess("namespaces", {}, Limits())
except SandboxError as error:
    print(error)
"""


def test_every_module_is_imported_on_macos_and_the_sandbox_says_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", MACOS], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    count, refusal = done.stdout.splitlines()
    assert int(count) > 150
    assert refusal == "needs Linux, and this is darwin"


@pytest.mark.parametrize(
    "statement",
    ["import agentrl", "from agentrl.env import register", "from agentrl.cli import main; main()"],
)
def test_windows_is_refused_in_one_line(statement: str) -> None:
    code = f"import sys; sys.platform = 'win32'; {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert line.startswith("agentrl runs on Linux and macOS; on Windows use it inside WSL")
    assert (done.stdout, done.returncode) == ("", 2)
