"""Training: from a configuration to a trained policy, step by step."""
