"""Expert that follows the simulator's own solution, also after other actions in between."""

import re

TELEPORT = "teleport to "
_MOVED = re.compile(r"You (?:move|teleport) to the (.+)\.$")


class GoldExpert:
    """Expert that plays a solution action by action, including waiting, since processes need time.

    A question is answered by the number in the solution, or by 0 if it has none. After an action of someone
    else the expert continues where it was; if it may teleport, it first returns to the room of the next
    action.

    Args:
        solution: The simulator's gold path.
        room: The room in which the agent starts.
        teleports: Whether the agent may teleport to any room.
    """

    def __init__(self, solution: list[str], room: str, teleports: bool) -> None:
        self.plan = tuple(solution)
        self._rooms = _rooms(self.plan, room)
        self._room = room
        self._teleports = teleports
        self._next = 0
        self._asking = self._asked = False

    def next(self) -> str:
        """Return the next action in the solution's words, "wait1" after the end of the solution."""
        if self._asking:
            return self._answer()
        while self._pending().isdigit():  # an answer to a question that was not asked
            self._next += 1
        return TELEPORT + self._rooms[self._next] if self._in_wrong_room() else self._pending()

    def observe(self, followed: bool, observation: str, asking: bool) -> None:
        """Record a step.

        Args:
            followed: Whether the action was the one that `next` returned.
            observation: The observation after the action.
            asking: Whether the observation is a question.
        """
        if followed and (self._answer() == self._pending() if self._asking else not self._in_wrong_room()):
            self._next += 1
        self._asking, self._asked = asking, followed
        moved = _MOVED.match(observation)
        if moved:
            self._room = moved[1]

    def _answer(self) -> str:
        return self._pending() if self._asked and self._pending().isdigit() else "0"

    def _in_wrong_room(self) -> bool:
        return self._teleports and self._next < len(self.plan) and self._rooms[self._next] != self._room

    def _pending(self) -> str:
        return self.plan[self._next] if self._next < len(self.plan) else "wait1"


def _rooms(plan: tuple[str, ...], room: str) -> list[str]:
    """Return the room to which each action of a plan belongs."""
    rooms = []
    for action in plan:
        rooms.append(room)
        if action.startswith(("go to ", TELEPORT)):
            room = action.partition(" to ")[2]
    return rooms
