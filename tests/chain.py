"""A chain of six states whose values are known: where every learner of the family must arrive."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

STATES, GAMMA = 6, 0.9
LEFT, RIGHT = 0, 1
# what the two ends pay, where an episode ends
PAY = {-1: 0.3, STATES: 1.0}
# a step to the right in mid-chain costs, so that values are no mere powers
COST = -0.05


class Chain(gym.Env):
    """Starts anywhere, moves one state per step, ends beyond the ends; observations are one-hot, or the state's number.

    Args:
        numbered: whether observations are numbers.
        masked: whether nobody may go to the left of the first state.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, numbered=False, masked=False):
        self.numbered, self.masked = numbered, masked
        self.observation_space = spaces.Discrete(STATES) if numbered else spaces.Box(0, 1, (STATES,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(STATES))
        return self._see(), self._say()

    def step(self, action):
        self.state, reward, ended = follow(self.state, int(action))
        return self._see(), reward, ended, False, self._say()

    def _say(self):
        return {"action_mask": np.array([self.state > 0, True])} if self.masked else {}

    def _see(self):
        # beyond an end there is nothing to see
        seen = min(max(self.state, 0), STATES - 1)
        return np.int64(seen) if self.numbered else np.eye(STATES, dtype=np.float32)[seen]


def follow(state, action):
    """State, reward and whether the episode is over, after an action."""
    after = state + (1 if action == RIGHT else -1)
    if after in PAY:
        return after, PAY[after], True
    return after, COST if action == RIGHT else 0.0, False


def fixed_point(backup, sweeps=300):
    """What is left of values, (states, actions), when a backup has been applied to them until they stay."""
    q_values = np.zeros((STATES, 2))
    for _ in range(sweeps):
        before, q_values = q_values, backup(q_values)
    assert np.abs(q_values - before).max() < 1e-9
    return q_values


def one_step(value):
    """(states, actions): reward, and the discounted value, (states,), of where it leads."""
    after = [[follow(s, a) for a in (LEFT, RIGHT)] for s in range(STATES)]
    return np.array([[r + (0.0 if over else GAMMA * value[s]) for s, r, over in row] for row in after])


def best_values():
    """Q*(s, a)."""
    return fixed_point(lambda q_values: one_step(q_values.max(1)))


def n_step_values(n_step):
    """What n-step targets without correction amount to where each action is played as often as the other."""

    def backup(q_values):
        value = q_values.max(1)
        for _ in range(n_step - 1):
            value = one_step(value).mean(1)
        return one_step(value)

    return fixed_point(backup)


def munchausen_values(temperature, alpha=0.9):
    """Soft values with the bonus of the taken action (Vieillard et al. 2020, eq. 2)."""

    def backup(q_values):
        best = q_values.max(1, keepdims=True)
        total = np.exp((q_values - best) / temperature).sum(1, keepdims=True)
        log_policy = (q_values - best) / temperature - np.log(total)
        bonus = alpha * np.clip(temperature * log_policy, -1, 0)
        return bonus + one_step((best + temperature * np.log(total))[:, 0])

    return fixed_point(backup)


gym.register("Chain-v0", Chain)
gym.register("NumberedChain-v0", Chain, kwargs={"numbered": True})
gym.register("MaskedChain-v0", Chain, kwargs={"masked": True})
