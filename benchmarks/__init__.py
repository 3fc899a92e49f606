"""Benchmarks of lightning_dqn and other libraries on the same workloads; run `python -m benchmarks`."""
