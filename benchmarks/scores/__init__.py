"""Scores at the end of training: configs x variants x seeds by the command line, see `python -m benchmarks.scores`."""
