"""Faster equivalents of the plain update: flat parameters, compiled gradients, CUDA graphs."""
