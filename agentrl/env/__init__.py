"""Text environments: contract, base classes, registry and task panels, independent of tokens and policies."""

from agentrl.env.contract import Check, ContractReport, TextEnv, check_text_env, text_env
from agentrl.env.contract.answers import reset_answer, step_answer
from agentrl.env.factors import PlayedTurn, register_factors
from agentrl.env.multi_turn import MultiTurnEnv
from agentrl.env.names import unknown
from agentrl.env.panel import Panel, load_panel, make_panel, verify
from agentrl.env.registry import Factory, broken_plugins, env_ids, load_plugins, make, register
from agentrl.env.spaces import TextSpace
from agentrl.env.wrappers import OneStepEnv

__all__ = [
    "Check",
    "ContractReport",
    "Factory",
    "MultiTurnEnv",
    "OneStepEnv",
    "Panel",
    "PlayedTurn",
    "TextEnv",
    "TextSpace",
    "broken_plugins",
    "check_text_env",
    "env_ids",
    "load_panel",
    "load_plugins",
    "make",
    "make_panel",
    "register",
    "register_factors",
    "reset_answer",
    "step_answer",
    "text_env",
    "unknown",
    "verify",
]
