"""Named errors: each message says where, what was found and what was wanted; the command exits with 2."""


class AgentRLError(Exception):
    """Base of every error that agentrl raises on purpose."""


class ConfigError(AgentRLError, ValueError):
    """A configuration, an override or an argument is wrong; the message lists every mistake with its path."""


class EnvironmentContractError(AgentRLError):
    """An environment broke the contract of `agentrl.env`."""


class MissingDependencyError(AgentRLError, ImportError):
    """An extra or a data package is absent; the message is the command that installs it."""


def missing_extra(lack: str, extra: str) -> MissingDependencyError:
    """Build the error for packages that come with an extra of agentrl.

    >>> str(missing_extra("learner.lora needs peft", "lora"))
    "learner.lora needs peft: pip install -e '.[lora]' (in agentrl's checkout)"
    """
    # By its bare name, pip would install the package index's agentrl, which is another project.
    return MissingDependencyError(f"{lack}: pip install -e '.[{extra}]' (in agentrl's checkout)")


class PanelError(AgentRLError, ValueError):
    """A panel of tasks cannot be read, or its hash is not that of the tasks it names."""


class CheckpointError(AgentRLError):
    """A checkpoint, run folder or model folder is absent, corrupt or does not fit."""


class RequirementError(AgentRLError, ValueError):
    """An algorithm needs a tensor or a capability that this run does not provide."""


class TooManyAbortedError(AgentRLError):
    """The share of aborted episodes passed `rollout.max_aborted_share`; the message counts the reasons."""


class NonFiniteError(AgentRLError):
    """Losses, gradients or weights are not finite; what is not is neither applied twice nor kept."""


class ClusterLostError(AgentRLError):
    """The connection to Ray is lost: its head, or the node on this machine, ended."""
