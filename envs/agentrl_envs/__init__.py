"""Environments that ship with agentrl, registered through the same entry point as third-party ones."""


def register() -> None:
    """Register the environments; called through the entry-point group `agentrl.envs`."""
    from agentrl.env import register, register_factors
    from agentrl_envs.factors import FACTORS

    register("agentrl/ALFWorld-v0", "agentrl_envs.alfworld_env:ALFWorldEnv")
    register("agentrl/MathTools-v0", "agentrl_envs.math_tools_env:MathToolsEnv")
    register("agentrl/Reasoning-v0", "agentrl_envs.reasoning_env:ReasoningEnv")
    register("agentrl/ReasoningGym-v0", "agentrl_envs.reasoning_gym_env:ReasoningGymEnv")
    register("agentrl/ScienceWorld-v0", "agentrl_envs.scienceworld_env:ScienceWorldEnv")
    register("agentrl/WebShop-v0", "agentrl_envs.webshop_env:WebShopEnv")
    for env_id, factors in FACTORS.items():
        register_factors(env_id, factors)
