"""Several environments in one: the id of a task begins with the name of its environment."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentrl.env.names import split_task
from agentrl.rollout.environments import Answered, Environments
from agentrl.rollout.play import EnvironmentCall, Reset, Restore, Stop, Transition

_TURN = 0.005  # seconds to wait for one of several environments, before it is the next one's turn


class MixedEnvironments(Environments):
    """Several environments, each with a placement of its own.

    Errors name the environment that they come from.

    Args:
        members: The environments by name.

    Attributes:
        members: The same, each of which knows its tasks by their own ids.
    """

    def __init__(self, members: Mapping[str, Environments]) -> None:
        self.members = dict(members)
        capacities = [member.capacity for member in members.values()]
        limits = [capacity for capacity in capacities if capacity is not None]
        self.capacity = sum(limits) if len(limits) == len(capacities) else None
        self._member_of: dict[str, str] = {}  # by episode in progress
        self._waiting: dict[str, str] = {}  # by episode whose call is not answered

    def find(self, task: str) -> tuple[Environments, str]:
        """Return the environments of a task, and its id there."""
        name, own = split_task(task)
        return self.members[name], own

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Pass a call on to the environment that a reset or a snapshot names, or that the episode is in."""
        if isinstance(effect, Reset):
            self._member_of[episode], own = split_task(effect.task)
            effect = replace(effect, task=own)
        elif isinstance(effect, Restore):
            self._member_of[episode], snapshot = effect.snapshot
            effect = Restore(snapshot)
        name = self._waiting[episode] = self._member_of[episode]
        self.members[name].submit(episode, effect)

    def poll(self, *, wait: bool, max_wait: float = math.inf) -> Sequence[Answered]:
        """Return the answers of all environments."""
        until = time.monotonic() + max_wait
        answers = [answer for name in self.members for answer in self._poll(name, wait=False)]
        while wait and not answers and self._waiting and (left := until - time.monotonic()) > 0:
            names = [name for name in self.members if name in self._waiting.values()]
            turn = left if len(names) == 1 else min(left, _TURN)
            answers = [answer for name in names for answer in self._poll(name, wait=True, max_wait=turn)]
            if len(names) == 1:
                break  # none within its time: what it waited for will not come
        self.restarts = sum(member.restarts for member in self.members.values())
        self.recycled = sum(member.recycled for member in self.members.values())
        return answers

    def _poll(self, name: str, *, wait: bool, max_wait: float = math.inf) -> list[Answered]:
        found: list[Answered] = []
        for episode, answer in self.members[name].poll(wait=wait, max_wait=max_wait):
            self._waiting.pop(episode, None)
            if isinstance(answer, Stop) and answer.error is not None:
                answer = replace(answer, error=f"{name}: {answer.error}")
            elif isinstance(answer, Transition) and answer.snapshot is not None:
                answer = replace(answer, snapshot=(name, answer.snapshot))
            found.append((episode, answer))
        return found

    def release(self, episode: str, *, broken: bool = False) -> None:
        """Give an episode's environment back."""
        self._waiting.pop(episode, None)
        name = self._member_of.pop(episode, None)
        if name is not None:
            self.members[name].release(episode, broken=broken)

    def borrow(self) -> Any:
        """Refuse: only the environments of a task can be borrowed from, see `find`."""
        raise TypeError("there are several environments: borrow one of those that `find` returns for a task")

    def close(self) -> None:
        """Close all environments."""
        self._waiting.clear()
        self._member_of.clear()
        for member in self.members.values():
            member.close()
