"""Predicts the throughput of many ranks from a single rank and the cost of collective calls; see `__main__`."""
