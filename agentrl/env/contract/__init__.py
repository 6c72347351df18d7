"""The environment contract, and the checks that prove it."""

from agentrl.env.contract.suite import Check, ContractReport, TextEnv, check_text_env, text_env

__all__ = ["Check", "ContractReport", "TextEnv", "check_text_env", "text_env"]
