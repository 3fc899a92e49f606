"""Catch (Mnih et al. 2014) as a game of 84 x 84 pixels: a ball falls, and a paddle at the bottom has to be under it."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

PIXELS, CELL = 84, 12
CELLS = PIXELS // CELL


class Catch(gym.Env):
    """The ball falls a row a step and drifts to one side, which only two frames tell; caught it pays 1, else -1.

    Actions: left, stay, right. The best return is 1, which any fall allows: the paddle starts in the middle, as many
    steps from each side as the ball needs at most.
    """

    env_id = "Catch-v0"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012  as Gymnasium declares it
    observation_space = spaces.Box(0, 255, (PIXELS, PIXELS), np.uint8)
    action_space = spaces.Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column = 0, int(self.np_random.integers(1, CELLS - 1))
        self.drift = int(self.np_random.integers(-1, 2))
        self.paddle = CELLS // 2
        return self.show(), {}

    def show(self):
        screen = np.zeros((CELLS, CELLS), np.uint8)
        screen[self.row, self.column] = 255
        screen[-1, self.paddle] = max(screen[-1, self.paddle], 128)
        return screen.repeat(CELL, 0).repeat(CELL, 1)

    def step(self, action):
        self.paddle = int(np.clip(self.paddle + action - 1, 0, CELLS - 1))
        self.row += 1
        if self.row % 2 == 0:
            self.column = int(np.clip(self.column + self.drift, 0, CELLS - 1))
        over = self.row == CELLS - 1
        reward = (1.0 if self.paddle == self.column else -1.0) if over else 0.0
        return self.show(), reward, over, False, {}

    def render(self):
        return self.show()[..., None].repeat(3, 2)


gym.register(Catch.env_id, Catch)
