"""The expert: the simulator's own solution, followed through what others do in between."""

import re

TELEPORT = "teleport to "
_MOVED = re.compile(r"You (?:move|teleport) to the (.+)\.$")


class GoldExpert:
    """Plays a solution action by action, those that change nothing as well: they are time that things need.

    A question is answered by the number that the solution answers it with, 0 where it had none. After
    somebody else's action it goes on where it was, and where it may teleport, from the room that the next
    action belongs to.

    Args:
        solution: the simulator's gold path.
        room: where the agent begins.
        teleports: whether it may go to any room at once.
    """

    def __init__(self, solution: list[str], room: str, teleports: bool) -> None:
        self.plan = tuple(solution)
        self._rooms = _rooms(self.plan, room)
        self._room = room
        self._teleports = teleports
        self._next = 0
        self._asking = self._asked = False

    def next(self) -> str:
        """The next action, in the solution's own words; "wait1" where the solution has ended."""
        if self._asking:
            return self._answer()
        while self._pending().isdigit():  # the question that this answers was not asked
            self._next += 1
        return TELEPORT + self._rooms[self._next] if self._astray() else self._pending()

    def observe(self, followed: bool, observation: str, asking: bool) -> None:
        """Take note of a step: was it what `next` had said, what did it show, was that a question."""
        if followed and (self._answer() == self._pending() if self._asking else not self._astray()):
            self._next += 1
        self._asking, self._asked = asking, followed
        moved = _MOVED.match(observation)
        if moved:
            self._room = moved[1]

    def _answer(self) -> str:
        return self._pending() if self._asked and self._pending().isdigit() else "0"

    def _astray(self) -> bool:
        return self._teleports and self._next < len(self.plan) and self._rooms[self._next] != self._room

    def _pending(self) -> str:
        return self.plan[self._next] if self._next < len(self.plan) else "wait1"


def _rooms(plan: tuple[str, ...], room: str) -> list[str]:
    """The room in which each action is meant."""
    rooms = []
    for action in plan:
        rooms.append(room)
        if action.startswith(("go to ", TELEPORT)):
            room = action.partition(" to ")[2]
    return rooms
