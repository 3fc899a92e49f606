"""Error messages for environments that fail: the index of the environment, its env steps and its episode step."""

import math
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from lightning_dqn._compat.gymnasium import failed_env_index


class BrokenEnvironmentError(RuntimeError):
    """An environment raised, or gave what can't be learnt from; the message names it and its step."""


def env_error(
    envs: VectorEnv[Any, Any, Any], error: Exception, env_steps: int, lengths: NDArray[np.int64]
) -> Exception:
    """What to raise where environments did.

    Args:
        envs: the environments.
        error: what one of them raised.
        env_steps: played so far.
        lengths: (N,) env steps of the episodes under way.
    """
    index = 0 if envs.num_envs == 1 else failed_env_index(error)
    where = _where(envs, index, env_steps, lengths)
    return BrokenEnvironmentError(f"{where}: raised {type(error).__name__}: {error}")


def non_finite_error(
    envs: VectorEnv[Any, Any, Any],
    observation: NDArray[Any],
    reward: NDArray[Any],
    env_steps: int,
    lengths: NDArray[np.int64],
) -> Exception:
    """What to raise for a NaN or an infinity among these, as float32, which they are stored as.

    Args:
        envs: the environments.
        observation: (N, ...) what they showed.
        reward: (N,) what they paid.
        env_steps: played so far.
        lengths: (N,) env steps of the episodes under way.
    """
    for name, values in (("reward", reward), ("observation", observation)):
        for index, *place in np.argwhere(~np.isfinite(values.astype(np.float32))):
            what = f"{name}{[int(i) for i in place] or ''} = {values[(index, *place)]}"
            where = _where(envs, int(index), env_steps, lengths)
            return BrokenEnvironmentError(
                f"{where}: {what} is no finite float32; it was not stored. Mend the environment, or wrap it"
            )
    raise AssertionError("all values are finite")


def empty_mask_error(
    envs: VectorEnv[Any, Any, Any], index: int, given: bool, env_steps: int, lengths: NDArray[np.int64]
) -> Exception:
    """The error for an action mask that allows no action although the episode continues.

    Args:
        envs: the environments.
        index: which of them.
        given: whether the environment returned an action mask.
        env_steps: played so far.
        lengths: (N,) env steps of the episodes under way.
    """
    what = 'info["action_mask"] allows no action' if given else 'there is no info["action_mask"]'
    where = _where(envs, index, env_steps, lengths)
    return BrokenEnvironmentError(f"{where}: {what}. Mend the environment, or leave data.action_masks out")


def _where(envs: VectorEnv[Any, Any, Any], index: int | None, env_steps: int, lengths: NDArray[np.int64]) -> str:
    env_id = envs.spec.id if envs.spec is not None else type(envs).__name__
    which = f"environment {index} of {envs.num_envs}" if index is not None else f"one of {envs.num_envs} environments"
    step = f", step {lengths[index] + 1} of its episode" if index is not None else ""
    return f"{env_id}, {which}, after {env_steps} env steps{step}"


def zeros_like_floats(envs: VectorEnv[Any, Any, Any]) -> NDArray[Any]:
    """As many zeros as an observation of all environments has floats: none if it has integers.

    Their product with an observation is 0, unless it holds a NaN or an infinity. It takes a microsecond, where
    `np.isfinite(...).all()` takes four.
    """
    space = envs.single_observation_space
    floats = space.dtype is not None and np.issubdtype(space.dtype, np.floating)
    return np.zeros(envs.num_envs * math.prod(space.shape or ()) if floats else 0, np.float32)
