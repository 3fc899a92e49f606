"""Sums of n rewards, made when they are drawn: a row keeps its own reward only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def sum_rewards(
    starts: NDArray[np.int64], rows: Mapping[str, NDArray[Any]], num_envs: int, gamma_power: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Rewards summed from each start on, the discount behind them, and the row of the last reward.

    Args:
        starts: (M,) rows.
        rows: reward, terminated and truncated of all rows of the ring; one time step on is num_envs rows on.
        num_envs: environments that write side by side, N.
        gamma_power: (n + 1,) gamma to the power of 0 to n.
    """
    # R = sum_{j < k} gamma^j r_j, where k <= n ends at the episode's end (Hessel et al. 2018, section 3)
    rewards, terminated, truncated = rows["reward"], rows["terminated"], rows["truncated"]
    reward, last, n_step = rewards.take(starts), starts, len(gamma_power) - 1
    if n_step == 1:
        return reward, gamma_power[1] * ~terminated.take(starts), starts
    steps = np.ones_like(starts)
    for k in range(1, n_step):
        goes_on = ~(terminated[last] | truncated[last])
        last = np.where(goes_on, (last + num_envs) % len(rewards), last)
        reward = reward + goes_on * gamma_power[k] * rewards[last]
        steps += goes_on
    # gamma^k (1 - terminated)
    return reward, gamma_power[steps] * ~terminated[last], last
