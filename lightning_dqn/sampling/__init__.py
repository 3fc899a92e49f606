"""Samplers other than the uniform one: prioritized replay and its sum tree."""

from lightning_dqn.sampling.prioritized import PrioritizedSampler as PrioritizedSampler
