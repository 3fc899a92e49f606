"""Predicts what many ranks would make of a run, from what one does alone and what messages cost; see `__main__`."""
