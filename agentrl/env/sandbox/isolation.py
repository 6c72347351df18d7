"""Isolation by the kernel: namespaces, a minimal file system, no privileges, and resource limits.

This runs inside the fork server and therefore imports very little. Linux only, except for the limits.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOBODY = 65534

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 4096, 16384, 1 << 18, 2
_READ_ONLY = _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unshare(flags: int, what: str) -> None:
    _check(_libc.unshare(flags), what)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() if kind else None)
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _prctl(option: int, value: int) -> None:
    unsigned = [ctypes.c_ulong(part) for part in (value, 0, 0, 0)]
    _check(_libc.prctl(option, *unsigned), f"prctl {option}")


@dataclass(frozen=True)
class Files:
    """The files that sandboxed code may read.

    Args:
        library: The folders of the standard library and of the system's shared libraries.
        masked: The folders of installed packages inside these, which are made to look empty.
        packages: The folders and files outside the library, or in a masked folder, that were imported.
    """

    library: Sequence[str]
    masked: Sequence[str]
    packages: Sequence[str]


class Namespaces:
    """Namespaces of the server and of each of its children.

    The server gets its own process, network, mount, IPC and host name namespaces (within a user namespace
    unless it is root), and a root folder that contains only what was imported. Each child gets its own user,
    process, mount and IPC namespaces, an empty folder to write to, and a user without any privileges.
    """

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._scratch = "/tmp"
        user, group = os.geteuid(), os.getegid()
        separate = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWPID
        self._drops_root = user == 0
        try:
            _unshare(separate if user == 0 else separate | _CLONE_NEWUSER, "new user namespace")
        except PermissionError:
            if user != 0:
                raise
            # Root in a container may need a user namespace too.
            self._drops_root = False
            _unshare(separate | _CLONE_NEWUSER, "new user namespace")
        if not self._drops_root:
            self._map_user(user, user, group)
        self._enter_process_namespace()
        self._processes = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)

    @staticmethod
    def _enter_process_namespace() -> None:
        """Continue as process 1 of the new process namespace, so that everything in it ends with this."""
        pid = os.fork()
        if pid:
            # This process only waits, and must not keep the other ends of sockets open.
            os.closerange(3, 1 << 20)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        die_with_parent()

    def _map_user(self, inside: int, user: int, group: int) -> None:
        self._write("setgroups", "deny")  # required before gid_map may be written without privileges
        self._write("uid_map", f"{inside} {user} 1")
        self._write("gid_map", f"{inside} {group} 1")

    def _write(self, name: str, text: str) -> None:
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self._proc)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    def restrict_files(self, files: Files) -> None:
        """Change to a read-only root folder that contains only `files`."""
        root = "/proc"  # contains none of the files to bind
        _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=4m")
        for path in files.library:
            self._bind(path, root)
        for path in files.masked:
            _mount("tmpfs", root + path, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=4m")
        for path in files.packages:
            self._bind(path, root)
        for path in files.masked:
            _mount("none", root + path, None, _MS_REMOUNT | _READ_ONLY)
        if os.path.exists(root + self._scratch):  # something was imported from there
            self._scratch = "/scratch"
        os.mkdir(root + self._scratch)
        os.environ["TMPDIR"] = os.environ["HOME"] = self._scratch
        os.chdir(root)
        # Stacks the old root on top of the new one, so that it can be detached without a mount point.
        _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
        _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
        os.chdir("/")
        _mount("none", "/", None, _MS_REMOUNT | _READ_ONLY)

    @staticmethod
    def _bind(path: str, root: str) -> None:
        """Bind a file or folder below the new root, read-only."""
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        elif not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o644))
        try:
            _mount(path, target, None, _MS_BIND)
        except OSError:  # in a user namespace, a tree must be bound together with the mounts inside it
            _mount(path, target, None, _MS_BIND | _MS_REC)
        keep = os.statvfs(target).f_flag & _MS_NOEXEC
        _mount("none", target, None, _MS_REMOUNT | _READ_ONLY | keep)

    def fork(self) -> int:
        """Fork like `os.fork`, with the child as process 1 of its own process namespace."""
        _unshare(_CLONE_NEWPID, "new process namespace")
        try:
            pid = os.fork()
        except OSError:
            self._leave_child_namespace()
            raise
        if pid:
            self._leave_child_namespace()
        return pid

    def _leave_child_namespace(self) -> None:
        _check(_libc.setns(self._processes, _CLONE_NEWPID), "setns to the server's process namespace")

    def isolate_child(self, file_mb: int) -> None:
        """Enter user, mount and IPC namespaces of the child, with `file_mb` of writable space."""
        self._write("oom_score_adj", "1000")  # if memory runs out, sandboxed code is killed first
        if self._drops_root:
            drop_root()
            _prctl(_PR_SET_DUMPABLE, 1)  # otherwise /proc/self belongs to root
        user, group = os.getuid(), os.getgid()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWIPC, "new user namespace for a session")
        self._map_user(NOBODY, user, group)
        options = f"mode=700,size={file_mb}m,nr_inodes=256"
        _mount("tmpfs", self._scratch, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
        os.chdir(self._scratch)


def drop_root() -> None:
    """Become the user nobody if the process is root, except in a user namespace that maps only root."""
    if os.geteuid() != 0:
        return
    try:
        os.setresgid(-1, NOBODY, -1)
    except OSError as fault:
        if fault.errno != errno.EINVAL:
            raise
        return  # the user namespace does not map nobody
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_privileges() -> None:
    """Drop all capabilities, forbid regaining any by running a program, and forbid tracing."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    header = struct.pack("Ii", 0x20080522, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def limit_resources(limits: Mapping[str, int]) -> None:
    """Set resource limits by the names of `resource.RLIMIT_*`, such as "CPU", capped at the hard limits."""
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except ValueError:  # macOS cannot limit the address space
            if name != "AS":
                raise
