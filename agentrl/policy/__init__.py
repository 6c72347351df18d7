"""Policies: text to tokens, tokens to generations."""
