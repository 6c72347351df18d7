"""Diagnostics of a trained policy: what it solves, how sure it is, and whether it reads its prompt."""
