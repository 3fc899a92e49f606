"""The index of the environment that failed, from Gymnasium's tracebacks."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from lightning_dqn._compat.gymnasium import failed_env_index


class Failing(gym.Env):
    """Raises in one of its methods, or in none."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, method=None):
        self.method = method

    def reset(self, *, seed=None, options=None):
        if self.method == "reset":
            raise OSError("failed")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        if self.method == "step":
            raise OSError("failed")
        return np.zeros(2, np.float32), 0.0, False, False, {}


def reset_and_step(envs):
    envs.reset()
    envs.step(np.zeros(envs.num_envs, np.int64))


@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize("make", [SyncVectorEnv, AsyncVectorEnv])
def test_the_index_of_the_environment_that_raised_is_found(make, method):
    envs = make([partial(Failing, method if i == 1 else None) for i in range(3)])
    with pytest.raises(OSError, match="failed") as error:
        reset_and_step(envs)
    assert failed_env_index(error.value) == 1
    envs.close()


def test_an_error_from_elsewhere_has_no_index():
    with pytest.raises(OSError, match="failed") as error:
        Failing("reset").reset()
    assert failed_env_index(error.value) is None
