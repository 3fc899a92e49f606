"""Measures lightning_dqn beside its peers on the same work; `python -m benchmarks` runs it."""
