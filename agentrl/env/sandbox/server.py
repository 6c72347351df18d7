"""The fork server and its children. It runs as a separate program, never in the training process.

The control socket first delivers the settings, then three descriptors per session: the channel and the output
file, which become the child's, and the monitor socket, which stays here. Any data on the monitor socket, or
its closing, kills the child; the child's exit status is sent back over it. The server ends with the process
that started it.
"""

import builtins
import errno
import fcntl
import gc
import importlib
import io
import json
import os
import random
import select
import selectors
import signal
import site
import socket
import struct
import sys
import types
from contextlib import suppress
from typing import Any, NoReturn

from agentrl.env.sandbox.filter import Program, filter_program, install_filter
from agentrl.env.sandbox.isolation import (
    Files,
    Namespaces,
    die_with_parent,
    drop_privileges,
    drop_root,
    limit_resources,
)
from agentrl.env.sandbox.notebook import describe, execute, line_suffix

_CHANNEL = 3
_SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_LOADER_FILES = ("/etc/ld.so.cache", "/lib/locale", "/usr/lib/locale")
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_MAX_DEPTH = 3  # of the search for other Pythons below a folder of shared libraries
_PYTHON_PREFIXES = ("python", "pypy")  # of the folder names of other Pythons
_OPENS = {"namespaces": "write", "bubblewrap": "read", "seccomp": "none"}


def main(control_fd: int, parent_fd: int) -> None:
    """Serve until the control socket closes or the parent process ends.

    Args:
        control_fd: The descriptor of the control socket.
        parent_fd: The pidfd of the parent process, or -1 if unknown.
    """
    control = socket.socket(fileno=control_fd)
    settings = json.loads(control.recv(1 << 20))
    library = [path for path in sys.path if os.path.isdir(path)]
    level, stage, program, namespaces = settings["isolation"], "start", None, None
    try:
        if level != "none" and settings["filter"]:
            program = filter_program(files=_OPENS[level], threads=level == "namespaces")
        if level == "namespaces":
            namespaces = Namespaces()  # before imports, which could start threads
        stage = "import"
        sys.path += settings["path"]
        for name in settings["imports"]:
            importlib.import_module(name)
        stage = "start"
        files = _readable_files(library)
        if namespaces:
            namespaces.restrict_files(files)
        server = Server(control, parent_fd, settings, namespaces, program)
    except BaseException as fault:
        control.send(json.dumps({"error": _line(fault), "stage": stage}).encode())
        return
    control.send(json.dumps({"files": vars(files)}).encode())
    server.serve()


def _readable_files(library: list[str]) -> Files:
    """Return the files that code may read: the standard library, shared libraries and imported packages."""

    def within(path: str, folders: list[str]) -> bool:
        return any(path.startswith(folder + os.sep) for folder in folders)

    shared = _shared_libraries()
    possible = {*sys.path, *(f"{folder}/{name}" for folder in library for name in _PACKAGE_FOLDERS)}
    others = [path for folder in shared for path in _other_pythons(folder, library)]
    library = [*library, *shared, *filter(os.path.exists, _LOADER_FILES)]
    masked = sorted(
        path
        for path in {*possible, *others}
        if os.path.isdir(path)
        and within(path, library)
        and not within(path, others)
        and (path in others or path.endswith(_PACKAGE_FOLDERS))
    )
    packages = []
    for name, module in list(sys.modules.items()):
        # The bare packages that this program itself was imported from have no spec.
        if "." in name or not getattr(module, "__spec__", None):
            continue
        for path in getattr(module, "__path__", None) or [getattr(module, "__file__", None)]:
            if path and (within(path, masked) or not within(path, library)):
                packages += [path, *filter(os.path.isdir, [path + ".libs"])]
    return Files([path for path in library if not within(path, library)], masked, packages)


def _shared_libraries() -> list[str]:
    """Return folders and files of shared libraries, only for this machine if they are sorted by machine."""
    found = []
    for folder in filter(os.path.isdir, _SHARED_LIBRARIES):
        paths = [os.path.join(folder, name) for name in os.listdir(folder)]
        of_a_kind = [path for path in paths if "-linux-" in path and os.path.isdir(path)]
        loose = [path for path in paths if ".so" in path and os.path.isfile(path)]
        found += [*of_a_kind, *loose] if of_a_kind else [folder]
    loaded = set()
    with suppress(OSError), open("/proc/self/maps") as maps:
        loaded = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    for path in sorted(loaded):
        folder = os.path.dirname(path)
        shared = path.startswith(tuple(f"{known}/" for known in _SHARED_LIBRARIES))
        if shared and not any(part in path.split("/") for part in _PACKAGE_FOLDERS):
            covered = any(f"{path}/".startswith(f"{known}/") for known in found)
            found += [] if covered or folder in _SHARED_LIBRARIES else [folder]
    return found


def _other_pythons(folder: str, library: list[str]) -> list[str]:
    """Return the folders below `folder` that contain another Python or packages installed for it."""
    ours = [os.path.realpath(path) for path in library]
    found = []
    for here, names, _ in os.walk(folder):
        for name in list(names):
            path = os.path.join(here, name)
            other = name.startswith(_PYTHON_PREFIXES) and not any(
                f"{own}/".startswith(f"{os.path.realpath(path)}/") for own in ours
            )
            if other or name in _PACKAGE_FOLDERS:
                found.append(path)
                names.remove(name)
        if here.count("/") - folder.count("/") >= _MAX_DEPTH:
            names.clear()
    return found


class Server:
    """Fork server that starts a child per session, kills it on request, and reports its exit status."""

    def __init__(
        self,
        control: socket.socket,
        parent_fd: int,
        settings: dict[str, Any],
        namespaces: Namespaces | None,
        program: Program | None,
    ) -> None:
        self._control, self._parent_fd = control, parent_fd
        self._namespaces, self._filter = namespaces, program
        self._level: str = settings["isolation"]
        self._limits: dict[str, int] = settings["limits"]
        self._file_mb: int = settings["file_mb"]
        self._memory_mb: int = settings["memory_mb"]
        self._monitors: dict[int, socket.socket] = {}
        self._life, self._alive = os.pipe()  # end of file on _life tells a child that the server is gone
        self._ready = selectors.DefaultSelector()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        site.setquit()
        gc.collect()
        gc.freeze()  # so that garbage collection in children does not copy the shared pages

    def serve(self) -> None:
        """Serve requests until the control socket closes or the parent process ends."""
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wakeup descriptor works only with a handler
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self._ready.register(self._control, selectors.EVENT_READ)
        self._ready.register(wake, selectors.EVENT_READ)
        if self._parent_fd >= 0:
            self._ready.register(self._parent_fd, selectors.EVENT_READ)
        serving = True
        while serving:
            for key, _ in self._ready.select():
                if key.data is not None:
                    self._ready.unregister(key.fileobj)
                    self._kill(key.data)
                elif key.fileobj is wake:
                    wake.recv(4096)
                elif key.fileobj is self._control:
                    serving = self._open_session()
                else:
                    serving = False
            self._reap()
        for pid in self._monitors:
            self._kill(pid)
        for pid in self._monitors:
            os.waitpid(pid, 0)

    def _open_session(self) -> bool:
        """Fork a child for the next request; return False if the control socket is closed."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, 1, 3)
        except ConnectionError:
            return False
        if not message:
            return False
        if len(descriptors) == 3:
            channel, output, monitor = descriptors[0], descriptors[1], socket.socket(fileno=descriptors[2])
            try:
                pid = self._namespaces.fork() if self._namespaces else os.fork()
            except OSError as fault:
                _report(monitor, {"error": _line(fault)})
            else:
                if pid == 0:
                    self._become_child(channel, output)
                self._monitors[pid] = monitor
                self._ready.register(monitor, selectors.EVENT_READ, pid)
        for end in descriptors[:2]:
            os.close(end)
        return True

    @staticmethod
    def _kill(pid: int) -> None:
        for stop in (os.killpg, os.kill):  # the child has no group of its own before it calls setsid
            with suppress(OSError):
                stop(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Report the exit status of every child that has ended, and kill what remains of its group."""
        for _ in range(len(self._monitors)):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
            monitor = self._monitors.pop(pid, None)
            if monitor:
                with suppress(KeyError):
                    self._ready.unregister(monitor)
                _report(monitor, {"status": status})

    def _become_child(self, channel: int, output: int) -> NoReturn:
        """Isolate this process, report that on the channel, and run the code that arrives there."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # This message, sent before any model code runs, is the only one of a child that is trusted.
            try:
                self._detach()
                channel = _keep_only(channel, output)
                self._restrict()
            except BaseException as fault:
                os.write(channel, _frame({"error": _line(fault)}))
            else:
                os.write(channel, _frame({}))
                _work(self._memory_mb, self._file_mb)
        finally:
            os._exit(0)

    def _detach(self) -> None:
        """Leave the server's process session, enter the child's namespaces, and die with the server."""
        os.setsid()
        os.close(self._alive)
        if self._namespaces:
            self._namespaces.isolate_child(self._file_mb)
        elif self._level == "seccomp":
            drop_root()
        if sys.platform == "linux":
            die_with_parent()
        # The server may have died before die_with_parent took effect.
        if select.select([self._life], [], [], 0)[0]:
            raise ProcessLookupError("the server is gone")

    def _restrict(self) -> None:
        limit_resources(self._limits)
        if self._level != "none":
            drop_privileges()
        if self._filter:
            install_filter(self._filter)


def _keep_only(channel: int, output: int) -> int:
    """Close all descriptors except 0 (null), 1 and 2 (output) and the channel, and return the channel's."""
    # Move both out of the way first, so that dup2 overwrites neither.
    channel, output = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (channel, output))
    for end, number in ((output, 1), (output, 2), (channel, _CHANNEL)):
        os.dup2(end, number, inheritable=False)
    os.closerange(_CHANNEL + 1, 1 << 20)
    return _CHANNEL


def _report(monitor: socket.socket, message: dict[str, Any]) -> None:
    with monitor, suppress(OSError):
        monitor.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)


def _line(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}"


def _frame(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def _read(size: int) -> bytes:
    """Read exactly `size` bytes from the channel."""
    data = b""
    while len(data) < size:
        part = os.read(_CHANNEL, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _work(memory_mb: int, file_mb: int) -> None:
    """Run every piece of code that arrives on the channel, all in one namespace."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    random.seed(0)  # the same numbers in every session; Python reseeds after a fork
    number = 0
    while True:
        (size,) = struct.unpack(">I", _read(4))
        code = _read(size).decode("utf-8", "replace")
        number += 1
        label = f"<code {number}>"
        # Make new streams every time, since the last execution may have closed or replaced them.
        stream = io.TextIOWrapper(
            io.FileIO(1, "w", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        sys.stdout = sys.stderr = stream
        error = None
        try:
            execute(code, module.__dict__, label)
            stream.flush()
        except MemoryError as fault:
            error = f"needed more than {memory_mb} MB{line_suffix(fault, label)}"
        except BaseException as fault:
            if isinstance(fault, OSError) and fault.errno in (errno.EFBIG, errno.ENOSPC):
                error = f"printed or wrote more than {file_mb} MB{line_suffix(fault, label)}"
            elif not isinstance(fault, SystemExit) or fault.code not in (None, 0):
                error = describe(fault, label)
        os.write(_CHANNEL, _frame({"number": number, "error": error}))
