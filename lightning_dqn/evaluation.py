"""Greedy episodes and their metrics: evaluation, test and prediction. Legend: T env steps, N envs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_dqn.collector import Policy
from lightning_dqn.distributed.sync import Sync
from lightning_dqn.envs import EnvSettings, make_env
from lightning_dqn.envs.errors import BrokenEnvironmentError

PARALLEL_ENVS = 16


class Episode(NamedTuple):
    """A finished greedy episode; without `keep_steps` the steps are empty.

    Attributes:
        episode_return: () undiscounted return.
        episode_length: () length in env steps, T.
        observation: (T, ...) observations.
        action: (T,) actions.
        reward: (T,) rewards.
    """

    episode_return: Tensor
    episode_length: Tensor
    observation: Tensor
    action: Tensor
    reward: Tensor


class EpisodeDataset(IterableDataset[Episode]):
    """Plays greedy episodes in parallel environments; one item is one finished episode.

    Every started episode is finished and counted, so short ones are not favoured. Episode i has the seed `seed + i` and
    does not depend on the number of parallel environments or ranks. Each pass creates new environments, so that state
    which they keep between episodes can't change the scores of a resumed run. Creating 16 takes a few milliseconds, or
    2 to 4 seconds for Atari games.

    Args:
        settings: settings of the environment.
        policy: chooses the actions.
        num_episodes: episodes of one pass, over all ranks.
        seed: seed of the first episode.
        max_episode_steps: largest length of an episode, in env steps.
        keep_steps: whether episodes contain their observations, actions and rewards.
        action_masks: whether the environments give action masks.
        sync: synchronization of the ranks, of which each plays every W-th episode; None for one rank.

    Raises:
        MisconfigurationException: if a rank would have no episode.
    """

    def __init__(
        self,
        settings: EnvSettings,
        policy: Policy,
        *,
        num_episodes: int,
        seed: int,
        max_episode_steps: int,
        keep_steps: bool = False,
        action_masks: bool = False,
        sync: Sync | None = None,
    ) -> None:
        super().__init__()
        sync = sync or Sync()
        if num_episodes < sync.world_size:
            # Lightning skips an evaluation without episodes, and the other ranks would wait
            raise MisconfigurationException(
                f"eval_episodes={num_episodes}: each of {sync.world_size} ranks plays at least one; raise it"
            )
        self.policy = policy
        self._numbers = range(sync.rank, num_episodes, sync.world_size)
        self.seed = seed
        self.max_episode_steps = max_episode_steps
        self.keep_steps = keep_steps
        self.action_masks = action_masks
        self._settings = settings
        self._envs: list[gym.Env[Any, Any]] = []

    def __len__(self) -> int:
        """Episodes of this rank in one pass."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Episode]:
        self.close()
        self._envs = envs = []
        try:
            for _ in range(min(len(self), PARALLEL_ENVS)):
                envs.append(make_env(self._settings))
            yield from self._play(envs)
        finally:
            _close(envs)

    def _play(self, envs: list[gym.Env[Any, Any]]) -> Iterator[Episode]:
        waiting = iter(self._numbers)
        running = [_EvalEnv(made, self.seed + i) for made, i in zip(envs, waiting, strict=False)]
        state: Tensor | None = None
        first = np.ones(len(running), np.bool_)
        while running:
            seen = np.stack([env.observation for env in running])
            mask = np.stack([env.mask() for env in running]) if self.action_masks else None
            actions, state = self.policy(seen, state, first, None, mask)
            first, left = np.zeros(len(running), np.bool_), []
            for i, (env, action) in enumerate(zip(running, actions, strict=True)):
                over = env.step(action)
                if over or len(env.rewards) >= self.max_episode_steps:
                    yield env.episode(self.keep_steps)
                    following = next(waiting, None)
                    if following is None:
                        continue
                    env.start(self.seed + following)
                    first[i] = True
                left.append(i)
            if len(left) < len(running):
                running, first = [running[i] for i in left], first[left]
                state = None if state is None else state[left]

    def close(self) -> None:
        """Close the environments of an unfinished pass."""
        _close(self._envs)


def _close(envs: list[gym.Env[Any, Any]]) -> None:
    """Close and remove the environments."""
    while envs:
        envs.pop().close()


class _EvalEnv:
    """An environment with the record of its current episode."""

    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        self.env = env
        self.start(seed)

    def start(self, seed: int) -> None:
        self.seed = seed
        self.observation, self.info = self.env.reset(seed=seed)
        self.observations: list[Any] = []
        self.actions: list[int] = []
        self.rewards: list[float] = []

    def mask(self) -> NDArray[np.bool_]:
        """Return the allowed actions (A,)."""
        return np.asarray(self.info["action_mask"], np.bool_)

    def step(self, action: np.int64) -> bool:
        """Make a step; return whether the episode is over."""
        self.observations.append(self.observation)
        self.actions.append(int(action))
        try:
            self.observation, reward, terminated, truncated, self.info = self.env.step(action)
        except Exception as error:
            env_id = self.env.spec.id if self.env.spec is not None else type(self.env).__name__
            where = f"{env_id}, evaluation episode of seed {self.seed}, step {len(self.actions)}"
            raise BrokenEnvironmentError(f"{where}: raised {type(error).__name__}: {error}") from error
        self.rewards.append(float(reward))
        return bool(terminated or truncated)

    def episode(self, keep_steps: bool) -> Episode:
        steps = slice(None) if keep_steps else slice(0)
        return Episode(
            episode_return=torch.tensor(sum(self.rewards), dtype=torch.float32),
            episode_length=torch.tensor(len(self.rewards), dtype=torch.float32),
            observation=torch.from_numpy(np.array(self.observations[steps])),
            action=torch.tensor(self.actions[steps], dtype=torch.int64),
            reward=torch.tensor(self.rewards[steps], dtype=torch.float32),
        )


class EpisodeMetrics(Metric):
    """Mean, standard deviation, minimum and maximum of returns, and mean length, over all devices."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("returns", [], dist_reduce_fx="cat")
        self.add_state("lengths", [], dist_reduce_fx="cat")
        self.returns: Any
        self.lengths: Any

    def update(self, episode_return: Tensor, episode_length: Tensor) -> None:
        """Add one episode; both arguments have shape ()."""
        self.returns.append(episode_return.reshape(1))
        self.lengths.append(episode_length.reshape(1))

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics by name."""
        returns, lengths = dim_zero_cat(self.returns), dim_zero_cat(self.lengths)
        return {
            "episode_return": returns.mean(),
            "episode_return_std": returns.std(correction=0),
            "episode_return_min": returns.min(),
            "episode_return_max": returns.max(),
            "episode_length": lengths.mean(),
        }
