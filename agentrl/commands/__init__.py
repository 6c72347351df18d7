"""The commands of `agentrl`, which import what they need when they are called."""
