"""Logs the seed and the actions of an environment's episode, from which another copy can replay it.

`resume.env_state` reads and writes the logs of a vector of environments. Legend: T actions.
"""

import hashlib
import time
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from lightning_dqn.resume.env_state import MAX_LOGGED_ACTIONS, EnvLog


class EpisodeLog(gym.Wrapper[Any, Any, Any, Any]):
    """Seeds every episode separately and logs its actions.

    A `reset(seed=s)` begins a sequence of episodes. Each is seeded from s and its number, so (s, number, actions)
    defines an episode: an environment that draws all its random numbers from `reset(seed=...)` repeats it exactly,
    wherever its state is stored (Python, C, another process).

    If seeding is slow, as for Atari games, a log may span several episodes, of which only the first is seeded.

    Args:
        env: environment with all its other wrappers.
        reseed_after: number of logged actions from which the next reset is seeded; 0 to seed every episode.
    """

    def __init__(self, env: gym.Env[Any, Any], *, reseed_after: int = 0) -> None:
        super().__init__(env)
        self.reseed_after = reseed_after
        self._seed: int | None = None
        self._number = 0
        self._actions = array("q")
        # number of actions before each unseeded reset
        self._resets = array("q")
        space = env.action_space
        self._width = 1 if isinstance(space, spaces.Discrete) else int(np.prod(space.shape or ()))
        self._capacity = MAX_LOGGED_ACTIONS * self._width
        # whether the next step resets: a new vector environment does not know that the restored episode has ended
        self.reset_next = False
        # whether the next reset is seeded although the log is short, because the environment did not repeat it
        self.reseed_next = False
        self._replay: Iterator[int] | None = None
        self._result: tuple[Any, float] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode or, with a seed, the first one of a new sequence."""
        self.reset_next = False
        if seed is not None or self._seed is None:
            self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
            self._number = 0
        elif self.reseed_next or len(self._actions) >= self.reseed_after * self._width:
            self._number += 1
        else:
            self._resets.append(len(self._actions) // self._width)
            return self.env.reset(options=options)
        self._actions, self._resets, self.reseed_next = array("q"), array("q"), False
        return self.env.reset(seed=self._episode_seed(), options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Log and apply an action; reset instead if the episode had ended before a restore."""
        if self.reset_next:
            observation, info = self.reset()
            return observation, 0.0, False, False, info
        actions = self._actions
        if len(actions) < self._capacity:
            # a MultiDiscrete action is an array
            (actions.append if self._width == 1 else actions.extend)(action)
        return self.env.step(action)

    @property
    def episode_log(self) -> EnvLog:
        """A copy of the log; setting it begins a replay, which `replay_for` continues."""
        return EnvLog(
            seed=self._seed or 0,
            number=self._number,
            actions=np.array(self._actions, np.int64).reshape(-1, self._width),
            resets=np.array(self._resets, np.int64),
        )

    @episode_log.setter
    def episode_log(self, log: EnvLog) -> None:
        """Load a log, and begin its replay unless it is full."""
        self._seed, self._number = log.seed, log.number
        self._actions = array("q", log.actions.ravel().tolist())
        self._resets = array("q", log.resets.tolist())
        self._result, self._replay = None, None if log.is_full else self._repeat(log.actions)

    def replay_for(self, seconds: float) -> int:
        """Continue a replay for about `seconds`; an error of the environment ends it without a result.

        Returns:
            Number of remaining actions plus one for the reset; 0 if the replay has ended.
        """
        until = time.monotonic() + seconds
        left: int = 1
        try:
            while self._replay is not None and time.monotonic() < until:
                left = next(self._replay)
        except Exception:  # StopIteration, or any error of an environment that can't repeat the episode
            self._replay = None
        return 0 if self._replay is None else left

    def replay_result(self) -> tuple[Any, float] | None:
        """The replayed last observation and the return of the last episode; None if the replay failed."""
        return self._result

    def _repeat(self, actions: NDArray[np.int64]) -> Iterator[int]:
        """Replay the logged episodes; yields the number of remaining actions plus one."""
        observation, _ = self.env.reset(seed=self._episode_seed())
        left = 1 + len(actions)
        played = actions if self._width > 1 else actions[:, 0]
        total = 0.0
        for part, (start, end) in enumerate(pairwise([0, *self._resets, len(actions)])):
            if part:
                observation, _ = self.env.reset()
                total = 0.0
            for action in played[start:end]:
                observation, reward, *_ = self.env.step(action)
                total += float(reward)
                left -= 1
                yield left
        self._result = observation, total

    def _episode_seed(self) -> int:
        """31 bits, which all environments accept; a hash takes a tenth of the time of a SeedSequence."""
        digest = hashlib.blake2b(b"%d %d" % (self._seed or 0, self._number), digest_size=4).digest()
        return int.from_bytes(digest, "little") >> 1
