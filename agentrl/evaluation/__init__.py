"""Evaluation: what a policy scores on a panel of tasks, and the report of it."""
