"""Python that a model wrote, run where it can do no harm."""

from agentrl.env.sandbox.client import IMPORTS, Sandbox, Session, probe
from agentrl.env.sandbox.process import LEVELS, Execution, Limits, SandboxError

__all__ = ["IMPORTS", "LEVELS", "Execution", "Limits", "Sandbox", "SandboxError", "Session", "probe"]
