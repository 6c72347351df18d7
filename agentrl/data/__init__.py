"""Records of episodes in plain Python, their tensors (`batch`) and their files (`storage`)."""

from agentrl.data.trajectory import BranchPoint, Episode, Group, Outcome, StopReason, Turn

__all__ = ["BranchPoint", "Episode", "Group", "Outcome", "StopReason", "Turn"]
