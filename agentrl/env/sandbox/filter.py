"""The seccomp filter of system calls that a sandboxed process irrevocably installs on itself."""

import ctypes
import platform
import struct
from collections.abc import Sequence

_Numbers = dict[str, tuple[int | None, int | None]]
_Step = tuple[int, int, int, int]
Program = list[_Step]


def _table(text: str) -> _Numbers:
    """Parse names of system calls with their numbers on x86_64 and aarch64 ("-": does not exist)."""
    rows = [row.split() for row in text.split(",")]
    return {
        name: (int(x86) if x86 != "-" else None, int(arm) if arm != "-" else None) for name, x86, arm in rows
    }


# Calls that any computation may use.
CALLS = _table(
    """
    read 0 63, write 1 64, close 3 57, lseek 8 62, fstat 5 80, mmap 9 222, munmap 11 215, brk 12 214,
    mprotect 10 226, mremap 25 216, madvise 28 233, futex 202 98, clock_gettime 228 113,
    clock_nanosleep 230 115, getrandom 318 278, rt_sigaction 13 134, rt_sigprocmask 14 135,
    rt_sigreturn 15 139, rt_sigpending 127 136, sigaltstack 131 132, pread64 17 67, pwrite64 18 68,
    readv 19 65, writev 20 66, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, pipe 22 -,
    pipe2 293 59, dup 32 23, dup2 33 -, dup3 292 24, nanosleep 35 101, gettimeofday 96 169, time 201 -,
    times 100 153, clock_getres 229 114, getrusage 98 165, getitimer 36 102, setitimer 38 103, alarm 37 -,
    pause 34 -, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175,
    getgid 104 176, getegid 108 177, getpgrp 111 -, getpgid 121 155, getsid 124 156, getgroups 115 158,
    getresuid 118 148, getresgid 120 150, uname 63 160, sysinfo 99 179, sched_yield 24 124,
    sched_getaffinity 204 123, getcpu 309 168, getrlimit 97 163, set_robust_list 273 99,
    get_robust_list 274 100, rseq 334 293, set_tid_address 218 96, restart_syscall 219 128, exit 60 93,
    exit_group 231 94, getcwd 79 17, umask 95 166, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
    epoll_pwait 281 22, eventfd2 290 19, msync 26 227, mincore 27 232
    """
)
READING = _table(
    """
    stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
    faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, chdir 80 49, fchdir 81 50,
    statfs 137 43, fstatfs 138 44
    """
)
WRITING = _table(
    """
    open 2 -, openat 257 56, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35,
    rename 82 -, renameat 264 38, renameat2 316 276, truncate 76 45, ftruncate 77 46, fsync 74 82,
    fdatasync 75 83, flock 73 32, chmod 90 -, fchmod 91 52, fchmodat 268 53, utimensat 280 88, link 86 -,
    linkat 265 37, symlink 88 -, symlinkat 266 36, sendfile 40 71
    """
)
# Calls that are allowed only with certain arguments.
GUARDED = _table(
    """
    open 2 -, openat 257 56, newfstatat 262 79, fcntl 72 25, ioctl 16 29, prlimit64 302 261, prctl 157 167,
    clone 56 220, clone3 435 435, tgkill 234 131
    """
)

_CLONE_THREAD, _NEW_NAMESPACE = 0x00010000, 0x7E020000
_PR_SET_NAME, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 15, 22, 2
_EPERM, _ENOSYS = 1, 38
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_OPENS_FOR_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0x400000
_AT_EMPTY_PATH = 0x1000
_FCNTL = (0, 1, 2, 3, 4, 1030)  # duplicate, get and set flags; not the owner, signal or size of a pipe
_IOCTL = (0x5401, 0x5450, 0x5451, 0x5421, 0x541B)  # TCGETS, FIONCLEX, FIOCLEX, FIONBIO, FIONREAD


def filter_program(*, files: str, threads: bool, machine: str | None = None) -> Program:
    """Return a BPF program that makes every call fail with EPERM unless it is allowed.

    Args:
        files: How files may be opened: "write", "read" or "none".
        threads: Whether threads may be started; new processes are never allowed.
        machine: "x86_64" or "aarch64"; None for this machine.

    Returns:
        The instructions as tuples (code, jump if true, jump if false, value).

    Raises:
        OSError: There is no table for the machine.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT:
        raise OSError(f"no system call filter for {machine}, only for {' and '.join(_AUDIT)}")
    column = list(_AUDIT).index(machine)
    refuse, allow = (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)

    def argument(index: int, high: bool = False) -> _Step:
        return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)

    def one_of(index: int, values: Sequence[int]) -> list[_Step]:
        tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return [argument(index), *tests, refuse, allow]

    def unless_bits(index: int, bits: int) -> list[_Step]:
        return [argument(index), (_ANY_BIT, 1, 0, bits), allow, refuse]

    guarded: dict[str, list[_Step]] = {
        "fcntl": one_of(1, _FCNTL),
        "ioctl": one_of(1, _IOCTL),
        "prctl": one_of(0, [_PR_SET_NAME]),
        # Only to read limits: the pointer to new ones must be null.
        "prlimit64": [argument(2), (_EQUAL, 0, 2, 0), argument(2, True), (_EQUAL, 1, 0, 0), refuse, allow],
        "clone3": [(_RETURN, 0, 0, _ERRNO | _ENOSYS)],  # libc falls back to clone
    }
    plain: list[str] = list(CALLS)
    if threads:
        # Threads of this process only: neither new processes nor new namespaces.
        guarded["clone"] = [
            argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_ANY_BIT, 0, 1, _NEW_NAMESPACE), refuse, allow
        ]  # fmt: skip
        plain.append("tgkill")
    numbers = GUARDED | CALLS | READING | WRITING
    if files == "none":
        guarded["newfstatat"] = [argument(3), (_ANY_BIT, 0, 1, _AT_EMPTY_PATH), allow, refuse]
    else:
        plain += READING
    if files == "read":
        guarded["open"] = unless_bits(1, _OPENS_FOR_WRITING)
        guarded["openat"] = unless_bits(2, _OPENS_FOR_WRITING)
    elif files == "write":
        plain += WRITING

    # A call through another architecture's ABI has other numbers, so it kills the process.
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, 0x40000000), refuse]  # calls of the x32 ABI
    for name in plain:
        number = numbers[name][column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), allow]
    for name, block in guarded.items():
        number = numbers[name][column]
        if number is not None:
            program += [(_EQUAL, 0, len(block), number), *block]
    return [*program, refuse]


class _Record(ctypes.Structure):
    """The C struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def install_filter(program: Program) -> None:
    """Install a filter on this process; needs no_new_privs or root."""
    steps = b"".join(struct.pack("=HBBI", *step) for step in program)
    record = _Record(len(steps) // 8, steps)
    address, zero = ctypes.c_ulong(ctypes.addressof(record)), ctypes.c_ulong(0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), address, zero, zero):
        raise OSError(ctypes.get_errno(), "the kernel takes no system call filter")
