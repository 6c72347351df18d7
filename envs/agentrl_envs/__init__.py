"""The environments that come with agentrl, registered as anyone else's are."""


def register() -> None:
    """Register them; entry point of the group `agentrl.envs`."""
    from agentrl.env import register

    register("agentrl/ALFWorld-v0", "agentrl_envs.alfworld_env:ALFWorldEnv")
