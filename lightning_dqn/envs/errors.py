"""Errors of environments, with the environment's index, the env steps and the step of the episode.

Common arguments: the vector of N environments `envs`, all env steps so far `env_steps`, and `lengths` (N,), the env
steps of the current episodes.
"""

import math
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from lightning_dqn._compat.gymnasium import failed_env_index


class BrokenEnvironmentError(RuntimeError):
    """An environment raised an error or returned invalid values; the message names it and its step."""


def env_error(
    envs: VectorEnv[Any, Any, Any], error: Exception, env_steps: int, lengths: NDArray[np.int64]
) -> BrokenEnvironmentError:
    """The error to raise for an exception of an environment."""
    index = 0 if envs.num_envs == 1 else failed_env_index(error)
    where = _where(envs, index, env_steps, lengths)
    return BrokenEnvironmentError(f"{where}: raised {type(error).__name__}: {error}")


def non_finite_error(
    envs: VectorEnv[Any, Any, Any],
    observation: NDArray[Any],
    reward: NDArray[Any],
    env_steps: int,
    lengths: NDArray[np.int64],
) -> BrokenEnvironmentError:
    """The error to raise for an observation (N, ...) or a reward (N,) that is not finite as float32."""
    for name, values in (("reward", reward), ("observation", observation)):
        for index, *place in np.argwhere(~np.isfinite(values.astype(np.float32))):
            what = f"{name}{[int(i) for i in place] or ''} = {values[(index, *place)]}"
            where = _where(envs, int(index), env_steps, lengths)
            return BrokenEnvironmentError(
                f"{where}: {what} is not a finite float32 and was not stored. Fix the environment, or wrap it"
            )
    raise AssertionError("all values are finite")


def empty_mask_error(
    envs: VectorEnv[Any, Any, Any], index: int, given: bool, env_steps: int, lengths: NDArray[np.int64]
) -> BrokenEnvironmentError:
    """The error to raise for environment `index` in an episode without an allowed action, or without a mask."""
    what = 'info["action_mask"] allows no action' if given else 'there is no info["action_mask"]'
    where = _where(envs, index, env_steps, lengths)
    return BrokenEnvironmentError(f"{where}: {what}. Fix the environment, or leave action_masks out")


def _where(envs: VectorEnv[Any, Any, Any], index: int | None, env_steps: int, lengths: NDArray[np.int64]) -> str:
    env_id = envs.spec.id if envs.spec is not None else type(envs).__name__
    if index is None:
        return f"{env_id}, one of {envs.num_envs} environments, after {env_steps} env steps"
    step = f"after {env_steps} env steps, step {lengths[index] + 1} of its episode"
    return f"{env_id}, environment {index} of {envs.num_envs}, {step}"


def zeros_like_floats(envs: VectorEnv[Any, Any, Any]) -> NDArray[Any]:
    """Zeros, as many as an observation of all environments has floats; none for integers.

    Their dot product with an observation is 0 unless it contains NaN or infinity, which takes 1 us instead of the 4 us
    of `np.isfinite(...).all()`.
    """
    space = envs.single_observation_space
    floats = space.dtype is not None and np.issubdtype(space.dtype, np.floating)
    return np.zeros(envs.num_envs * math.prod(space.shape or ()) if floats else 0, np.float32)
