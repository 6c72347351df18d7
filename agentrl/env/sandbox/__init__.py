"""Sandbox that runs model-written Python in isolated processes."""

from agentrl.env.sandbox.client import IMPORTS, Sandbox, Session, probe
from agentrl.env.sandbox.process import LEVELS, Execution, Limits, SandboxError
from agentrl.env.sandbox.provider import (
    PROGRAM,
    PipedServer,
    PipedSession,
    SandboxProvider,
    SandboxServer,
    SandboxSession,
    register_sandbox,
    sandbox_names,
)

__all__ = [
    "IMPORTS",
    "LEVELS",
    "PROGRAM",
    "Execution",
    "Limits",
    "PipedServer",
    "PipedSession",
    "Sandbox",
    "SandboxError",
    "SandboxProvider",
    "SandboxServer",
    "SandboxSession",
    "Session",
    "probe",
    "register_sandbox",
    "sandbox_names",
]
