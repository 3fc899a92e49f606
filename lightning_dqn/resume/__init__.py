"""Exact resume: saves, checks and restores the state of a run."""
