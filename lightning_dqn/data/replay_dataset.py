"""Plays environments and yields minibatches from the memory: what training draws from.

Lies between `envs` and `replay` on one side and `module.DQN.training_step` on the other; it sees the module only as a
policy, a function from observations to actions. Legend: U updates, B batch, N envs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_dqn.data.faults import not_finite, raised, zeros_like_floats
from lightning_dqn.replay import ReplayMemory, Transition
from lightning_dqn.snapshots import restore, snapshot


class Policy(Protocol):
    """Chooses actions: (N, ...) observations to (N,) actions, greedy without a generator."""

    def __call__(self, observation: NDArray[Any], rng: np.random.Generator | None = None) -> NDArray[np.int64]: ...


@dataclass
class EpisodeHistory:
    """All training episodes that ended so far, one entry each, oldest first.

    Attributes:
        returns: sums of rewards.
        lengths: in env steps.
        env_steps: where on the env-step clock each ended.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    env_steps: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.returns)

    def state_dict(self) -> dict[str, Tensor]:
        """The entries as tensors."""
        return {
            "returns": torch.tensor(self.returns, dtype=torch.float64),
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "env_steps": torch.tensor(self.env_steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave, in place, so that who holds this history sees it."""
        self.returns[:] = state["returns"].tolist()
        self.lengths[:] = state["lengths"].tolist()
        self.env_steps[:] = state["env_steps"].tolist()


class ReplayDataset(IterableDataset[Transition]):
    """Plays N environments and yields minibatches from the memory: one item is one iteration.

    An iteration plays `steps_per_iteration` steps in each environment, then yields U minibatches of B transitions, or
    none (U = 0) while the memory warms up. Steps that only reset an environment are no env steps; they are played on
    top, so that the clock keeps its pace to within N. All state lies on the object: a new iterator, which Lightning
    makes every epoch, goes on where the last one stopped.

    Args:
        envs: the environments, reset by NEXT_STEP.
        memory: where the steps go.
        policy: what chooses the actions.
        seed: of exploration and of the environments.
        steps_per_iteration: env steps in each environment before a batch is yielded.
        updates_per_iteration: minibatches in a batch, U.
        batch_size: transitions in a minibatch, B.
        warmup_env_steps: env steps before the first minibatch.
        epoch_env_steps: env steps in an epoch.
    """

    def __init__(
        self,
        *,
        envs: VectorEnv[Any, Any, Any],
        memory: ReplayMemory,
        policy: Policy,
        seed: int | np.random.SeedSequence,
        steps_per_iteration: int,
        updates_per_iteration: int,
        batch_size: int,
        warmup_env_steps: int,
        epoch_env_steps: int,
    ) -> None:
        super().__init__()
        self.envs = envs
        self.memory = memory
        self.policy = policy
        self.env_steps = 0
        self.episodes = EpisodeHistory()
        self.updates_per_iteration = updates_per_iteration
        self.batch_size = batch_size
        self.warmup_env_steps = warmup_env_steps
        self._warm_at = warmup_env_steps
        self._iteration_env_steps = steps_per_iteration * envs.num_envs
        self._length = -(-epoch_env_steps // self._iteration_env_steps)
        self._rng = np.random.default_rng(seed)
        self._due = 0
        self._observation: NDArray[Any] | None = None
        self._resetting = np.zeros(envs.num_envs, dtype=np.bool_)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._no_reward, self._no_observation = np.zeros(envs.num_envs, np.float32), zeros_like_floats(envs)

    def __len__(self) -> int:
        """Iterations in an epoch. Without it Lightning would fetch, and so play, one batch ahead."""
        return self._length

    @property
    def epoch_env_steps(self) -> int:
        """Env steps in an epoch: what was asked for, in whole iterations."""
        return self._length * self._iteration_env_steps

    def __iter__(self) -> Iterator[Transition]:
        if get_worker_info() is not None:
            raise ValueError("num_workers > 0: workers play with weights that never learn; use num_workers=0")
        for _ in range(len(self)):
            self._due += self._iteration_env_steps
            while self._due >= self.envs.num_envs:
                self._due -= self._step()
            ready = self.env_steps >= self._warm_at and len(self.memory) > 0
            yield self.memory.sample(self.updates_per_iteration if ready else 0, self.batch_size)

    def _step(self) -> int:
        """Step every environment once, store it, and return how many of them really played."""
        if self._observation is None:
            self._observation = self._first_observation()
            self.memory.begin(self._observation)
            self._resetting[:] = False
            self._returns[:] = 0
            self._lengths[:] = 0
        action = self.policy(self._observation, self._rng)
        try:
            observation, reward, terminated, truncated, _ = self.envs.step(action)
        except Exception as error:
            raise raised(self.envs, error, self.env_steps, self._lengths) from error
        self._check(observation, reward)
        self._observation = observation
        self.memory.append(action, reward, terminated, truncated, self._observation)
        playing = ~self._resetting
        self._resetting = terminated | truncated
        self._returns += reward
        self._lengths += playing
        # count_nonzero is a tenth of the methods sum and any
        played = int(np.count_nonzero(playing))
        self.env_steps += played
        if np.count_nonzero(self._resetting):
            self._record_episodes()
        return played

    def _first_observation(self) -> NDArray[Any]:
        try:
            observation, _ = self.envs.reset(seed=int(self._rng.integers(2**31)))
        except Exception as error:
            raise raised(self.envs, error, self.env_steps, self._lengths) from error
        self._check(observation, self._no_reward)
        return observation  # type: ignore[no-any-return]

    def _check(self, observation: NDArray[Any], reward: NDArray[Any]) -> None:
        """Refuse a NaN or an infinity before it is stored: such a number times 0 is not 0."""
        fine = reward.astype(np.float32).dot(self._no_reward) == 0
        if self._no_observation.size:
            fine = fine and observation.astype(np.float32, copy=False).ravel().dot(self._no_observation) == 0
        if not fine:
            raise not_finite(self.envs, observation, reward, self.env_steps, self._lengths)

    def _record_episodes(self) -> None:
        """Enter the episodes that have just ended into the history and start their sums anew."""
        for i in np.flatnonzero(self._resetting):
            self.episodes.returns.append(float(self._returns[i]))
            self.episodes.lengths.append(int(self._lengths[i]))
            self.episodes.env_steps.append(self.env_steps)
        self._returns[self._resetting] = 0
        self._lengths[self._resetting] = 0

    def state_dict(self, *, with_envs: bool = True, with_memory: bool = True) -> dict[str, Any]:
        """Everything the next iterations depend on, as tensors and plain values.

        Args:
            with_envs: whether the environments are in it, so that episodes under way can go on.
            with_memory: whether the memory is; it is not copied, see there.

        Raises:
            CannotSnapshotError: if environments that shall be in it hold what can't be written down.
        """
        state = {
            "env_steps": self.env_steps,
            "due": self._due,
            "warm_at": self._warm_at,
            "rng": self._rng.bit_generator.state,
            "episodes": self.episodes.state_dict(),
        }
        if with_memory:
            state["memory"] = self.memory.state_dict()
        if with_envs and self._observation is not None:
            state["under_way"] = {
                "envs": snapshot(self.envs),
                # in its own layout, which the last bit of a matrix product may depend on
                "observation": torch.from_numpy(self._observation.copy(order="K")),
                "resetting": torch.from_numpy(self._resetting.copy()),
                "returns": torch.from_numpy(self._returns.copy()),
                "lengths": torch.from_numpy(self._lengths.copy()),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Without its environments, these start new episodes, and those that were under way are kept as truncated.
        Without its memory, this one stays empty and is warmed up anew.

        Raises:
            CannotRestoreError: if the environments were made in another way.
        """
        self.env_steps, self._due, self._warm_at = state["env_steps"], state["due"], state["warm_at"]
        self._rng.bit_generator.state = state["rng"]
        self.episodes.load_state_dict(state["episodes"])
        if "memory" in state:
            self.memory.load_state_dict(state["memory"])
        else:
            self._warm_at = self.env_steps + self.warmup_env_steps
        self._observation = None
        under_way = state.get("under_way")
        # without the rows before it an episode can't go on in the memory
        if under_way is not None and "memory" in state:
            restore(self.envs, under_way["envs"])
            self._observation = under_way["observation"].numpy().copy(order="K")
            self._resetting = under_way["resetting"].numpy().copy()
            self._returns[:] = under_way["returns"].numpy()
            self._lengths[:] = under_way["lengths"].numpy()
