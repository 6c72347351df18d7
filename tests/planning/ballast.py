"""An environment of some weight, in a module that a worker can import without the learner's packages."""

from agentrl.env import MultiTurnEnv, register

BALLAST = "agentrl-tests/Ballast-v0"


class Ballast(MultiTurnEnv):
    """Holds forty megabytes and ends at once."""

    splits = ("train", "test")

    def problems(self, split: str) -> list[int]:
        return list(range(5))

    def start(self, problem: int) -> str:
        self.ballast = b"x" * 40_000_000
        return "say anything"

    def act(self, action: str) -> tuple[str, float, bool]:
        return "done", 1.0, True


register(BALLAST, Ballast)
