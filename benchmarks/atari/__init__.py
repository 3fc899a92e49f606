"""Pong from its pixels: this package's runs, its peer's, the bare update, and stepping alone."""
