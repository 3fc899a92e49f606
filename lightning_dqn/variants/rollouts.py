"""Steps environments and yields rollouts, for learners without a replay memory.

Legend: U updates, B batch, T steps, N envs.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_dqn.collector import Collector, Mask, Policy
from lightning_dqn.distributed.sync import Sync
from lightning_dqn.resume.content import check_dict, check_int, generator_from


class Rollout(NamedTuple):
    """The steps of one iteration, and the indices of its minibatches.

    Attributes:
        observation: (T + 1, N, ...) observations before each step, and after the last.
        action: (T, N) actions of the environment, int64.
        reward: (T, N) rewards.
        discount: (T, N) gamma (1 - terminated), the weight of the value of the next observation.
        ended: (T, N) whether the episode terminated or was truncated there.
        action_mask: (T + 1, N, A) allowed actions of each observation; (T + 1, N, 0) without action masks.
        index: (U, B) steps of each minibatch, t * N + n for step t of environment n; excludes reset steps.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    ended: Tensor
    action_mask: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class RolloutDataset(IterableDataset[Rollout]):
    """Steps N environments and yields one rollout per iteration, which is not stored.

    An iteration takes `steps_per_iteration` env steps in each environment. Steps that only reset an environment are not
    env steps; additional steps compensate for them to within N env steps, so T is sometimes larger by one. The
    observation after the last step of an episode is its final observation (NEXT_STEP autoreset). All state is stored on
    the object: Lightning makes a new iterator every epoch, which continues where the last one stopped.

    Args:
        envs: vector environment with NEXT_STEP autoreset.
        policy: chooses the actions.
        gamma: discount of one step.
        seed: seed of exploration and of the environments.
        sample_seed: seed of the minibatches.
        steps_per_iteration: env steps in each environment of one rollout.
        updates_per_iteration: minibatches of one rollout, U.
        batch_size: steps in a minibatch, B.
        epoch_env_steps: env steps in an epoch, over all ranks.
        action_masks: whether the environments return action masks.
        sync: synchronization with the other ranks; None for a single process.
    """

    def __init__(
        self,
        *,
        envs: VectorEnv[Any, Any, Any],
        policy: Policy,
        gamma: float,
        seed: int | np.random.SeedSequence,
        sample_seed: int | np.random.SeedSequence,
        steps_per_iteration: int,
        updates_per_iteration: int,
        batch_size: int,
        epoch_env_steps: int,
        action_masks: bool = False,
        sync: Sync | None = None,
    ) -> None:
        super().__init__()
        self.sync = sync or Sync()
        self.envs = envs
        self.collector = Collector(envs=envs, policy=policy, seed=seed, action_masks=action_masks)
        self.episodes = self.collector.episodes
        self.memory = None
        self.gamma = gamma
        self.updates_per_iteration = updates_per_iteration
        self.batch_size = batch_size
        self._sample_rng = np.random.default_rng(sample_seed)
        self._iteration_env_steps = steps_per_iteration * envs.num_envs
        self._length = -(-epoch_env_steps // (self._iteration_env_steps * self.sync.world_size))
        self._no_mask = np.zeros((envs.num_envs, 0), np.bool_)
        dtype = envs.single_observation_space.dtype
        self._dtype = np.float32 if dtype == np.float64 else dtype

    def __len__(self) -> int:
        """Iterations in an epoch. Without a length, Lightning prefetches a batch, and with it env steps."""
        return self._length

    @property
    def epoch_env_steps(self) -> int:
        """Env steps in an epoch, a whole number of iterations."""
        return self._length * self._iteration_env_steps * self.sync.world_size

    @property
    def env_steps(self) -> int:
        """Env steps so far, of all ranks."""
        return self.collector.env_steps if not self.sync.is_distributed else self.sync.env_steps

    def __iter__(self) -> Iterator[Rollout]:
        if get_worker_info() is not None:
            raise ValueError("num_workers > 0: worker processes do not receive updated weights; use num_workers=0")
        for _ in range(len(self)):
            rollout = self._play()
            if self.sync.is_distributed:
                self.sync.all_gather(self.collector.env_steps)
            yield rollout

    def _play(self) -> Rollout:
        collector, steps = self.collector, []
        observations = [collector.start() if collector.observation is None else collector.observation]
        masks, playable = [self._mask()], [~collector.resetting]
        for *step, observation, _ in collector.steps(self._iteration_env_steps):
            steps.append(step)
            observations.append(observation)
            masks.append(self._mask())
            playable.append(~collector.resetting)
        action, reward, terminated, truncated = (np.stack(parts) for parts in zip(*steps, strict=True))
        return Rollout(
            observation=torch.from_numpy(np.stack(observations).astype(self._dtype, copy=False)),
            action=torch.from_numpy(action),
            reward=torch.from_numpy(reward.astype(np.float32)),
            discount=torch.from_numpy(np.float32(self.gamma) * ~terminated),
            ended=torch.from_numpy(terminated | truncated),
            action_mask=torch.from_numpy(np.stack(masks)),
            index=torch.from_numpy(self._draw(np.flatnonzero(playable[:-1]))),
        )

    def _mask(self) -> NDArray[np.bool_]:
        mask = self.collector.action_mask
        return self._no_mask if mask is None else mask

    def _draw(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Minibatches (U, B) of all rows in random order, in several passes if there are too few."""
        size = self.updates_per_iteration * self.batch_size
        passes = [self._sample_rng.permutation(rows) for _ in range(-(-size // len(rows)))]
        return np.concatenate(passes)[:size].reshape(self.updates_per_iteration, self.batch_size)

    def state_dict(self, *, with_envs: bool = True) -> dict[str, Any]:
        """All state that the next iterations depend on, as tensors and plain values.

        Args:
            with_envs: whether to include the environments, so that unfinished episodes can continue.
        """
        others = {"sample_rng": self._sample_rng.bit_generator.state, "all_env_steps": self.env_steps}
        return {**self.collector.state_dict(with_envs=with_envs), **others}

    def reopen(self, envs: VectorEnv[Any, Any, Any], state: Mapping[str, Any]) -> None:
        """Continue in new environments; see `Collector.reopen`."""
        self.envs = envs
        self.collector.reopen(envs, state)

    def load_state_dict(self, state: Any, name: str = "train") -> Mask:
        """Load a state from `state_dict`; without the environments in it, new episodes start.

        Args:
            state: a state from `state_dict`.
            name: name of the state in the checkpoint.

        Returns:
            (N,) mask of the environments that did not repeat their episodes.

        Raises:
            CheckpointError: if it is not a state of this class.
        """
        state = check_dict(state, name, ("sample_rng", "all_env_steps"))
        self._sample_rng = generator_from(state["sample_rng"], f"{name}.sample_rng")
        self.sync.env_steps = check_int(state["all_env_steps"], f"{name}.all_env_steps")
        return self.collector.load_state_dict(state, name, iteration_env_steps=self._iteration_env_steps)
