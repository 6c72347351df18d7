"""Texts of an environment for prompts: the task, the instructions, the forms of actions and the tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from agentrl.env.tools import Tool, read_tools
from agentrl.errors import EnvironmentContractError
from agentrl.values import ValueFaultError, as_text, describe_value


@dataclass(frozen=True, slots=True)
class Briefing:
    """The task of an episode and what holds for all of its turns; see `TextEnv` for what authors declare.

    Args:
        task: The text of the task; None if the environment does not name it.
        instructions: What to do in this environment, and how an action is written.
        action_forms: Forms that stand for all actions with a prefix, by prefix.
        max_steps: The largest number of steps of the episode; None if unknown.
        tools: The tools that the environment declares; none if it declares none.
        env: The id of the environment; None if it was not made by one.
    """

    task: str | None = None
    instructions: str = ""
    action_forms: Mapping[str, str] = field(default_factory=dict)
    max_steps: int | None = None
    tools: tuple[Tool, ...] = ()
    env: str | None = field(default=None, compare=False)

    def list_actions(self, actions: Sequence[str]) -> list[str]:
        """Return the actions as a prompt lists them, each form once.

        >>> Briefing(action_forms={"search[": "search[words]"}).list_actions(["search[a]", "search[b]", "go"])
        ['search[words]', 'go']
        """
        prefixes = self.action_forms.items()
        forms = (next((form for start, form in prefixes if name.startswith(start)), name) for name in actions)
        return list(dict.fromkeys(forms))


def read_briefing(env: gymnasium.Env[str, str], info: Mapping[str, Any]) -> Briefing:
    """Return what an environment says about itself, and about the task whose `reset` gave `info`.

    Raises:
        EnvironmentContractError: A declared text has another type; the message names it.
    """
    known: Any = env.unwrapped
    fault = briefing_fault(known)
    if fault is not None:
        raise EnvironmentContractError(fault)
    limit = getattr(known, "max_steps", None)
    return Briefing(
        task=info.get("task_text"),
        instructions=getattr(known, "instructions", ""),
        action_forms=dict(getattr(known, "action_forms", {})),
        max_steps=limit if isinstance(limit, int) else None,
        tools=read_tools(getattr(known, "action_tools", ())),
        env=getattr(getattr(known, "spec", None), "id", None),
    )


def briefing_fault(known: Any) -> str | None:
    """Return what is wrong with the declared texts and tools of an unwrapped environment, or None."""
    try:
        as_text(getattr(known, "instructions", ""))
    except ValueFaultError as fault:
        return f"instructions {fault}"
    try:
        read_tools(getattr(known, "action_tools", ()))
    except ValueFaultError as fault:
        return str(fault)
    forms = getattr(known, "action_forms", {})
    if isinstance(forms, Mapping) and all(isinstance(text, str) for pair in forms.items() for text in pair):
        return None
    return f"action_forms is {describe_value(forms)}, wanted a mapping of prefixes to forms, both str"
