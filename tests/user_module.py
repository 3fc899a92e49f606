"""A module of a user: a learner, networks, a wrapper and environments that no file may import without trust."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from torch import nn

from lightning_dqn import DQN
from lightning_dqn.callbacks import EpsilonSchedule


class Bonus(DQN):
    """Its loss has an argument of its own."""

    def __init__(self, observation_space, action_space, *, bonus=0.5, **kwargs):
        super().__init__(observation_space, action_space, **kwargs)
        self.save_hyperparameters()
        self.bonus = bonus

    def td_loss(self, batch, policy_net, target_net):
        return super().td_loss(batch._replace(reward=batch.reward + self.bonus), policy_net, target_net)


class Net(nn.Sequential):
    """A network of its own."""

    def __init__(self, observation_space, num_actions, width=8):
        size = int(np.prod(observation_space.shape))
        super().__init__(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, num_actions))

    def forward(self, observation):
        return super().forward(observation.float())


def make_net(observation_space, num_actions):
    """A network as a plain function."""
    return Net(observation_space, num_actions, width=5)


class Steps(EpsilonSchedule):
    """A schedule of its own: 1, and `end` after some env steps."""

    def __init__(self, end: float = 0.25, after: int = 100):
        self.end, self.after = end, after

    def epsilon_at(self, env_steps):
        return self.end if env_steps >= self.after else 1.0


class Shift(gym.Wrapper):
    """A wrapper with a plain argument."""

    def __init__(self, env, by=1.0):
        super().__init__(env)
        self.by = by

    def step(self, action):
        observation, reward, *flags = self.env.step(action)
        return observation, reward + self.by, *flags


class Room(gym.Env):
    """Observations of any space; 10 steps."""

    def __init__(self, observation_space, action_space=None, token=None):
        self.observation_space, self.token = observation_space, token
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return self.observation_space.sample(), float(action == 1), False, self.time >= 10, {}


ROOMS = {
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
    "MultiBinary": spaces.MultiBinary(5),
    "Dict": spaces.Dict(place=spaces.Box(-1, 1, (2,)), room=spaces.Discrete(4)),
    "Tuple": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2, 2))]),
    "Bytes": spaces.Box(0, 255, (10, 10, 4), np.uint8),
}
for name, space in ROOMS.items():
    gym.register(f"{name}-v0", Room, kwargs={"observation_space": space})
SHIFTED = {"observation_space": spaces.Box(-1, 1, (3,)), "action_space": spaces.Discrete(2, start=3)}
gym.register("Shifted-v0", Room, kwargs=SHIFTED)


class Cue(gym.Env):
    """Ten times: a cue is shown, and the action that it names pays 1. The best return is 10."""

    observation_space = spaces.Dict(cue=spaces.Discrete(2), noise=spaces.Box(-1, 1, (3,), np.float32))

    def __init__(self, start=0):
        self.action_space = spaces.Discrete(2, start=start)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 10
        return self.show(), {}

    def show(self):
        self.cue = int(self.np_random.integers(2))
        return {"cue": self.cue, "noise": self.np_random.uniform(-1, 1, 3).astype(np.float32)}

    def step(self, action):
        assert self.action_space.contains(action)
        reward = float(action - self.action_space.start == self.cue)
        self.left -= 1
        return self.show(), reward, self.left == 0, False, {}


gym.register("Cue-v0", Cue)
gym.register("CueFrom3-v0", Cue, kwargs={"start": 3})
