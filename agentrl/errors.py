"""Exceptions of agentrl. Messages say where, what was found and what was wanted; the command exits with 2."""


class AgentRLError(Exception):
    """Base class of every error that agentrl raises on purpose."""


class ConfigError(AgentRLError, ValueError):
    """A configuration, override or argument is invalid; the message lists every mistake with its path."""


class EnvironmentContractError(AgentRLError):
    """An environment violated the contract of `agentrl.env.TextEnv`."""


class MissingDependencyError(AgentRLError, ImportError):
    """An extra or a data package is not installed; the message ends with the command that installs it."""


def missing_extra(lack: str, extra: str) -> MissingDependencyError:
    """Return the error for a missing package that an extra of agentrl installs.

    Args:
        lack: What needs which package.
        extra: The name of the extra.

    >>> str(missing_extra("learner.lora needs peft", "lora"))
    "learner.lora needs peft: pip install -e '.[lora]' (in agentrl's checkout)"
    """
    # From the package index, pip would install an unrelated project of our name.
    return MissingDependencyError(f"{lack}: pip install -e '.[{extra}]' (in agentrl's checkout)")


class PanelError(AgentRLError, ValueError):
    """A task panel cannot be read, or its hash does not match the tasks it names."""


class CheckpointError(AgentRLError):
    """A checkpoint, run folder or model folder is missing, damaged or incompatible."""


class RequirementError(AgentRLError, ValueError):
    """An algorithm requires a tensor or a capability that this run does not provide."""


class TooManyAbortedError(AgentRLError):
    """The share of aborted episodes exceeded `rollout.max_aborted_share`; the message counts the reasons."""


class NonFiniteError(AgentRLError):
    """Losses, gradients or weights are not finite; non-finite updates are neither applied nor saved."""


class ClusterLostError(AgentRLError):
    """The connection to Ray is lost: its head, or the node on this machine, ended."""
