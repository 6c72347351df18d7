"""LLM agents that learn multi-turn text tasks by reinforcement learning."""
