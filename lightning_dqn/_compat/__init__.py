"""Functions that depend on internals of other packages, each with a test."""
