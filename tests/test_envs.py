"""Vectors of environments against Gymnasium's own."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from lightning_dqn.envs import EnvSettings, SingleVectorEnv, make_env, make_vector_env


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "FrozenLake-v1", "Blackjack-v1"])
def test_a_vector_of_one_plays_as_gymnasiums_bitwise(env_id):
    # cut at 30 steps, so that episodes end in both ways; Blackjack's observations are flattened
    settings = EnvSettings(env_id, {"max_episode_steps": 30})
    ours = make_vector_env(settings, 1)
    theirs = make_vector_env(settings, 1, "sync")
    assert isinstance(ours, SingleVectorEnv)
    assert isinstance(theirs, SyncVectorEnv)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    rng = np.random.default_rng(0)
    seen = [(ours.reset(seed=7)[0], theirs.reset(seed=7)[0])]
    for _ in range(300):
        action = rng.integers(ours.single_action_space.n, size=1)
        seen += list(zip(ours.step(action)[:4], theirs.step(action)[:4], strict=True))
    assert sum(bool(flag) for flag, _ in seen[3::4]) + sum(bool(flag) for flag, _ in seen[4::4]) > 3
    for one, other in seen:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.array_equal(one, other)


def test_a_reset_in_mid_episode_begins_a_new_one():
    envs = SingleVectorEnv(make_env(EnvSettings("CartPole-v1")))
    start, _ = envs.reset(seed=3)
    for _ in range(500):
        _, _, terminated, truncated, _ = envs.step(np.array([0]))
        if terminated[0] or truncated[0]:
            break
    again, _ = envs.reset(seed=[3])
    assert np.array_equal(start, again)
    # the next step plays: the end before the reset is forgotten
    assert envs.step(np.array([0]))[1][0] == 1.0


def test_closing_a_vector_of_one_closes_its_environment():
    class Door(gym.Wrapper):
        is_open = True

        def close(self):
            self.is_open = False
            super().close()

    door = Door(make_env(EnvSettings("CartPole-v1")))
    envs = SingleVectorEnv(door)
    envs.close()
    assert not door.is_open
    assert envs.closed
