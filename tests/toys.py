"""An environment that holds what a test gives it, and the way of a snapshot through a checkpoint."""

import io

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv


def through_a_checkpoint(state):
    """What a snapshot is after `torch.save` and a safe load."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Toy(gym.Env):
    """Holds `value`, which a test gives it, and does little else."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)

    def __init__(self, value=None):
        self.action_space = spaces.Discrete(2)
        self.value = value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        return np.array([self.draw()], dtype=np.float64), 0.0, self.np_random.random() < 0.1, False, {}

    def draw(self):
        return 0.0


def toys(*values, toy=Toy):
    """A vector of toys that hold these values."""
    return SyncVectorEnv([lambda value=value: toy(value) for value in values])
