"""Built-in environments, registered the way a third party registers theirs."""


def register() -> None:
    """Entry point of the group `agentrl.envs`."""
