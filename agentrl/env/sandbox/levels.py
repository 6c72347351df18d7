"""Ours: a fork server whose children are shut in by the kernel, in one of three ways or not at all."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentrl.env.sandbox.process import LEVELS, Limits, ServerProcess
from agentrl.env.sandbox.provider import register_sandbox


@dataclass(frozen=True)
class Level:
    """One of `LEVELS`, or "none"."""

    name: str

    def available(self) -> str | None:
        """Say that it needs Linux, where it does; the rest shows when it is started."""
        if self.name != "none" and sys.platform != "linux":
            return f"needs Linux, and this is {sys.platform}"
        return None

    def start(self, *, limits: Limits, imports: Sequence[str], filter: bool = True) -> ServerProcess:
        """Start a server; without `filter`, without that of system calls."""
        return ServerProcess(self.name, _settings(imports, limits, self.name, filter), limits)


def _settings(imports: Sequence[str], limits: Limits, isolation: str, filter: bool) -> dict[str, Any]:
    kernel = {
        "AS": limits.memory_mb << 20,
        "FSIZE": limits.file_mb << 20,
        "NOFILE": limits.open_files,
        "CPU": int(100 * limits.cpu_seconds) + 1,
        "CORE": 0,
    }
    if isolation != "none":  # where the kernel would count all that the user runs
        kernel["NPROC"] = limits.threads
    return {
        "imports": list(imports),
        "path": [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")],
        "limits": kernel,
        "file_mb": limits.file_mb,
        "memory_mb": limits.memory_mb,
        "filter": filter,
    }


for _name in LEVELS:
    register_sandbox(_name, partial(Level, _name))
