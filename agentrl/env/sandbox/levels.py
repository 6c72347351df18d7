"""The built-in levels of isolation: a fork server whose children the kernel isolates, or not ("none")."""

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
    """Provider of one of `LEVELS`, or of "none"."""

    name: str

    def available(self) -> str | None:
        """Return the reason if the level needs Linux and this is another system; `start` checks the rest."""
        if self.name != "none" and sys.platform != "linux":
            return f"needs Linux, and this is {sys.platform}"
        return None

    def start(self, *, limits: Limits, imports: Sequence[str], filter: bool = True) -> ServerProcess:
        """Start a server, optionally without the system call filter."""
        return ServerProcess(self.name, _settings(imports, limits, self.name, filter), limits)


def _settings(imports: Sequence[str], limits: Limits, isolation: str, filter: bool) -> dict[str, Any]:
    """Return the settings message for the server."""
    kernel = {
        "AS": limits.memory_mb << 20,
        "FSIZE": limits.file_mb << 20,
        "NOFILE": limits.open_files,
        "CPU": int(100 * limits.cpu_seconds) + 1,
        "CORE": 0,
    }
    if isolation != "none":  # without isolation, the kernel would count all processes of the user
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
