"""Scores at the end of training, by configuration, variant and seed; see `python -m benchmarks.scores`."""
