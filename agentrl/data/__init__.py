"""What happened (records, stdlib only) and its tensors (`agentrl.data.batch`)."""

from agentrl.data.trajectory import BranchPoint, Episode, Group, Outcome, StopReason, Turn

__all__ = ["BranchPoint", "Episode", "Group", "Outcome", "StopReason", "Turn"]
