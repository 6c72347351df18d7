"""Engines, environments and learner ranks on a Ray cluster, and generation with vLLM."""
