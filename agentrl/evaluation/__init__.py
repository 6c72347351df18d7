"""Measure what a policy scores on a panel of tasks, and report it as tables, figures and a page."""
