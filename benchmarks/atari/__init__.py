"""Pong from pixels: this package, Stable-Baselines3, the update alone, and the environments alone."""
