"""The whole against a plain loop: the textbook algorithm, written down once more without Lightning or our memory."""

import math
from collections import deque

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from torch import nn

from lightning_dqn import DQN, DQNDataModule
from lightning_dqn.envs.episode_log import EpisodeLog


def network():
    return nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


def textbook_loop(seed, num_updates):
    """Train on CartPole with the textbook's values; the policy net's parameters after so many updates."""
    torch.manual_seed(seed)
    policy_net, target_net = network(), network()
    target_net.load_state_dict(policy_net.state_dict())
    optimizer = torch.optim.AdamW(policy_net.parameters(), lr=1e-4, amsgrad=True)
    memory = deque(maxlen=10_000)
    # the same draws as the package: a generator for play, one for replay
    play, replay = (np.random.default_rng(s) for s in np.random.SeedSequence([seed, 0]).spawn(4)[:2])
    # and the same seeds of episodes
    env = EpisodeLog(gym.make("CartPole-v1"))
    observation, _ = env.reset(seed=int(play.integers(2**31)))
    env_steps = updates = 0

    def act():
        epsilon = 0.05 + (0.9 - 0.05) * math.exp(-env_steps / 1000)
        if play.random() < epsilon:
            return int(play.integers(2))
        with torch.no_grad():
            return int(policy_net(torch.tensor(observation).unsqueeze(0)).argmax())

    while updates < num_updates:
        action = act()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        memory.append((observation, action, reward, terminated, next_observation))
        env_steps += 1
        if len(memory) >= 128:
            rows = [memory[i] for i in replay.integers(len(memory), size=128)]
            state, taken, gain, end, following = (torch.tensor(np.array(column)) for column in zip(*rows, strict=True))
            q = policy_net(state).gather(1, taken.unsqueeze(1)).squeeze(1)
            with torch.no_grad():
                best = target_net(following).max(1).values
            y = gain.float() + 0.99 * (1 - end.float()) * best
            loss = nn.SmoothL1Loss()(q, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(policy_net.parameters(), 100)
            optimizer.step()
            updates += 1
            with torch.no_grad():
                for slow, fast in zip(target_net.parameters(), policy_net.parameters(), strict=True):
                    slow.lerp_(fast, 0.005)  # 0.005 * fast + (1 - 0.005) * slow
        observation = next_observation
        if terminated or truncated:
            act()  # a vector environment is given an action on its way to the next episode, and ignores it
            observation, _ = env.reset()
    return list(policy_net.parameters()), list(target_net.parameters()), env_steps


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_after_500_updates_are_those_of_the_textbook_loop(seed):
    policy, target, env_steps = textbook_loop(seed, 500)

    pl.seed_everything(seed)
    data = DQNDataModule()
    model = DQN(data.observation_space, data.action_space)
    trainer = quiet_trainer(max_epochs=None, max_steps=500, limit_val_batches=0)
    trainer.fit(model, data)

    assert trainer.global_step == 500
    assert data.env_steps == env_steps
    for ours, theirs in zip(model.policy_net.parameters(), policy, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    for ours, theirs in zip(model.target_net.parameters(), target, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
