"""The replay memory: stores env steps as a stream and samples minibatches of transitions.

`data.ReplayDataset` appends to it and samples from it. A `Sampler` chooses the rows, `storage` stores the observations.
Legend: U updates, B batch, N envs, A actions, n rewards summed, k frames in a stack, W ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.distributed.reshard import reshard
from lightning_dqn.resume.memory_state import check_memory_state
from lightning_dqn.storage.arrays import make_storage, stored_form
from lightning_dqn.storage.frames import FrameStacks
from lightning_dqn.storage.row_queue import RowQueue


class Transition(NamedTuple):
    """A minibatch of transitions (B,), or U of them (U, B).

    Attributes:
        observation: (U, B, ...) s.
        action: (U, B) a, int64, in the environment's action space.
        reward: (U, B) r_1 + gamma r_2 + ... of the k <= n rewards up to the episode's end.
        discount: (U, B) gamma^k (1 - terminated), the factor of the value of next_observation.
        next_observation: (U, B, ...) s' after those k steps.
        weight: (U, B) importance weight of the row in the loss.
        index: (U, B) row in the memory, for samplers with priorities.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    weight: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index

    @property
    def action_mask(self) -> Tensor | None:
        """None: all actions are allowed."""
        return None

    @property
    def next_action_mask(self) -> Tensor | None:
        """None: all actions are allowed."""
        return None


class MaskedTransition(NamedTuple):
    """A `Transition` of an environment with action masks.

    Attributes:
        action_mask: (U, B, A) True for actions that are allowed in s.
        next_action_mask: (U, B, A) True for actions that are allowed in s'.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    weight: Tensor
    index: Tensor  # type: ignore[assignment]  # as above
    action_mask: Tensor
    next_action_mask: Tensor


AnyTransition = Transition | MaskedTransition


class Sampler(ABC):
    """Chooses rows of the memory. Rows are added and dropped in the order of time.

    A subclass defines the abstract methods; those after `load_state_dict` are for samplers with priorities.

    Attributes:
        uses_priorities: whether `callbacks.PriorityUpdate` must write priorities and set `beta`.
        beta: exponent of the importance weights, in [0, 1].
    """

    uses_priorities: bool = False
    beta: float = 1.0

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows that can be drawn."""

    @abstractmethod
    def add(self, rows: NDArray[np.int64]) -> None:
        """Add rows (n,), which are newer than all others."""

    @abstractmethod
    def drop_oldest(self, count: int) -> None:
        """Remove the `count` oldest rows."""

    @abstractmethod
    def draw(self, size: int, minibatches: int = 1) -> tuple[NDArray[np.int64], Tensor]:
        """Return rows (size,) of `minibatches` minibatches, and their importance weights (size,)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def bytes_per_row(self) -> int:
        """Bytes of RAM per row of the memory."""
        return 8

    def update_priorities(self, rows: NDArray[np.int64], priorities: NDArray[Any]) -> None:  # noqa: B027  optional
        """Set the priorities (n,) of rows (n,)."""

    def local_stats(self, minibatches: int) -> NDArray[np.float64]:
        """Return the statistics (K,) of this rank that importance weights over all ranks depend on."""
        return np.zeros(0)

    def apply_global_stats(self, stats: NDArray[np.float64]) -> NDArray[np.float32] | None:
        """Return factors (U,) of the last weights from the statistics (W, K) of all ranks; None for 1."""
        return None

    def load_priorities(self, rows: NDArray[np.int64], priorities: NDArray[np.float64], states: Sequence[Any]) -> None:
        """Add rows (n,) with the priorities (n,) that they had in the samplers with these states."""
        self.add(rows)


# creates a sampler from a capacity in rows and a seed
SamplerCallable = Callable[[int, int | np.random.SeedSequence], Sampler]


class UniformSampler(Sampler):
    """Samples all rows with the same probability, with replacement, in constant time.

    Args:
        capacity: largest number of rows.
        seed: seed of the draws.
    """

    def __init__(self, capacity: int, seed: int | np.random.SeedSequence) -> None:
        self._queue = RowQueue(capacity)
        self._rng = np.random.default_rng(seed)
        self._ones = torch.ones(0)

    def __len__(self) -> int:
        return self._queue.count

    def add(self, rows: NDArray[np.int64]) -> None:
        """Add rows (n,), which are newer than all others."""
        self._queue.add(rows)

    def drop_oldest(self, count: int) -> None:
        """Remove the `count` oldest rows."""
        self._queue.drop_oldest(count)

    def draw(self, size: int, minibatches: int = 1) -> tuple[NDArray[np.int64], Tensor]:
        """Return rows (size,) and their importance weights (size,), which are 1."""
        queue = self._queue
        picks = self._rng.integers(queue.count, size=size)
        if len(self._ones) != size:
            self._ones = torch.ones(size)
        return queue.rows.take(queue.first + picks, mode="wrap"), self._ones

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        return {**self._queue.state_dict(), "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._queue.load_state_dict(state)
        self._rng.bit_generator.state = state["rng"]


def sum_rewards(
    starts: NDArray[np.int64], rows: Mapping[str, NDArray[Any]], num_envs: int, gamma_power: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Sum the rewards of n-step returns.

    Args:
        starts: (M,) first rows.
        rows: reward, terminated and truncated of all rows; the next time step is N rows later, modulo the capacity.
        num_envs: number of environments, N.
        gamma_power: (n + 1,) gamma to the power of 0 to n.

    Returns:
        Summed rewards (M,), discount of the value after them (M,), and rows of the last rewards (M,).
    """
    # R = sum_{j < k} gamma^j r_j, where k <= n ends at the episode's end (Hessel et al. 2018, section 3)
    rewards, terminated, truncated = rows["reward"], rows["terminated"], rows["truncated"]
    reward, last, n_step = rewards.take(starts), starts, len(gamma_power) - 1
    if n_step == 1:
        return reward, gamma_power[1] * ~terminated.take(starts), starts
    steps = np.ones_like(starts)
    for k in range(1, n_step):
        continues = ~(terminated[last] | truncated[last])
        last = np.where(continues, (last + num_envs) % len(rewards), last)
        reward = reward + continues * gamma_power[k] * rewards[last]
        steps += continues
    # gamma^k (1 - terminated)
    return reward, gamma_power[steps] * ~terminated[last], last


class ReplayMemory:
    """Stores the last env steps of N environments, one row per time step and environment.

    A row is `observation, action, reward, terminated, truncated`; the next observation is that of the next row. The row
    after the end of an episode has its last observation; the environment ignores its action (NEXT_STEP autoreset of
    Gymnasium), and it is never drawn as a start. Rows are ordered by time: row = slot * N + environment.

    Of stacked frames, oldest first, each row stores the newest one, and `sample` builds the stacks. The frames before
    the first of an episode must be zeros, as in Gymnasium's `FrameStackObservation(env, k, padding_type="zero")` and
    the vector environments of ale_py.

    Args:
        capacity: largest number of transitions, over all environments; the row after an episode's end counts as one.
        num_envs: number of environments, N.
        observation_space: space of one observation, (k, ...) for stacked frames.
        gamma: discount factor of one step.
        n_step: number of rewards summed, n >= 1.
        frame_stack: frames in an observation, k; 1 for no stacking.
        device: device of the observations; None for RAM. Other columns are in RAM.
        folder: folder of a memory-mapped, unlinked file for the observations; None for none.
        mask_size: number of actions with action masks, A; 0 without masks.
        sampler: creates the sampler from the number of rows and the seed.
        seed: seed of the sampler.

    Raises:
        ValueError: if observations are not such stacks, or can't be stored on the device or in the folder.
    """

    def __init__(
        self,
        *,
        capacity: int,
        num_envs: int,
        observation_space: gym.Space[Any],
        gamma: float,
        n_step: int = 1,
        frame_stack: int = 1,
        device: torch.device | None = None,
        folder: Path | None = None,
        mask_size: int = 0,
        sampler: SamplerCallable = UniformSampler,
        seed: int | np.random.SeedSequence = 0,
    ) -> None:
        self.num_envs = num_envs
        self.n_step = n_step
        self.frame_stack = frame_stack
        # the newest slot has no action yet and the n - 1 before it lack rewards, so they can't be drawn; the k - 1
        # oldest hold frames of later stacks
        self._slots = -(-capacity // num_envs) + n_step + frame_stack - 1
        slots = (self._slots, num_envs)
        shape, dtype = stored_form(observation_space, frame_stack)
        self._observations = make_storage(slots + shape, dtype, device, folder)
        # pages of np.zeros take no memory until they are written
        self._written: dict[str, NDArray[Any]] = {
            "action": np.zeros(slots, np.int64),
            "reward": np.zeros(slots, np.float32),
            "terminated": np.zeros(slots, np.bool_),
            "truncated": np.zeros(slots, np.bool_),
            "playable": np.zeros(slots, np.bool_),
        }
        if mask_size:
            self._written["action_mask"] = np.zeros((*slots, mask_size), np.bool_)
        self._stacks: FrameStacks | None = None
        if frame_stack > 1:
            age = self._written["age"] = np.zeros(slots, np.uint8)
            self._stacks = FrameStacks(frame_stack=frame_stack, num_envs=num_envs, storage=self._observations, age=age)
        # views by row for sampling, in NumPy, whose calls take less time than torch's
        self._rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in self._written.items()}
        self._cursor = 0
        self._steps = 0
        self._after_end = np.zeros(num_envs, dtype=np.bool_)
        self._drawable = np.zeros(self._slots, dtype=np.int64)
        self._gamma_power = np.array([gamma**k for k in range(n_step + 1)], np.float32)
        self.sampler = sampler(self._slots * num_envs, seed)

    def __len__(self) -> int:
        """Number of transitions that can be drawn."""
        return len(self.sampler)

    def begin(self, observation: NDArray[Any], action_mask: NDArray[np.bool_] | None = None) -> None:
        """Start the stream, also after an interruption; unfinished episodes are then stored as truncated.

        Args:
            observation: (N, ...) first observations of episodes; (N, k, ...) stacks.
            action_mask: (N, A) allowed actions, if the memory stores masks.

        Raises:
            ValueError: if they are stacks that do not begin with zeros.
        """
        if self._steps:
            self.truncate(np.ones(self.num_envs, np.bool_))
            self._advance(np.zeros(self.num_envs, dtype=np.bool_))
        self._see(observation, action_mask)
        if self._stacks is not None:
            self._stacks.begin(self._cursor, observation)
        self._after_end[:] = False

    def truncate(self, mask: NDArray[np.bool_]) -> None:
        """Mark unfinished episodes as truncated; the next `append` stores the steps that reset them.

        Args:
            mask: (N,) True for the environments.
        """
        if self._steps:
            last = (self._cursor - 1) % self._slots
            self._written["truncated"][last] |= mask & self._written["playable"][last] & ~self._ended(last)
        self._after_end |= mask

    def append(  # noqa: PLR0917  in the order of `VectorEnv.step`
        self,
        action: NDArray[np.int64],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        next_observation: NDArray[Any],
        next_action_mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Store one step of all environments, taken from the observations stored last.

        Args:
            action: (N,) actions.
            reward: (N,) rewards.
            terminated: (N,) whether the episode terminated.
            truncated: (N,) whether the episode was truncated.
            next_observation: (N, ...) observations after the step, (N, k, ...) for stacks; the last observation of an
                episode that ended.
            next_action_mask: (N, A) actions allowed there, if the memory stores masks.
        """
        slot = self._cursor
        self._written["action"][slot] = action
        self._written["reward"][slot] = reward
        self._written["terminated"][slot] = terminated
        self._written["truncated"][slot] = truncated
        self._advance(~self._after_end)
        self._see(next_observation, next_action_mask)
        if self._stacks is not None:
            self._stacks.follow(slot, self._cursor, self._after_end)
        self._after_end = terminated | truncated

    def _see(self, observation: NDArray[Any], action_mask: NDArray[np.bool_] | None) -> None:
        """Write an observation and its mask into the slot of the next step."""
        self._observations.write(self._cursor, observation if self._stacks is None else observation[:, -1])
        if action_mask is not None:
            self._written["action_mask"][self._cursor] = action_mask

    def _advance(self, playable: NDArray[np.bool_]) -> None:
        """Complete the slot at the cursor, make the rows n - 1 slots before it drawable, and free the next slot."""
        self._written["playable"][self._cursor] = playable
        self._steps += 1
        if self._steps >= self.n_step:
            start = (self._cursor - self.n_step + 1) % self._slots
            rows = start * self.num_envs + self._written["playable"][start].nonzero()[0]
            self.sampler.add(rows)
            self._drawable[start] = len(rows)
        self._cursor = (self._cursor + 1) % self._slots
        # the freed slot also holds a frame of the k - 1 slots after it
        oldest = (self._cursor + self.frame_stack - 1) % self._slots
        self.sampler.drop_oldest(int(self._drawable[oldest]))
        self._drawable[oldest] = 0

    def _ended(self, slot: int) -> NDArray[np.bool_]:
        ended: NDArray[np.bool_] = self._written["terminated"][slot] | self._written["truncated"][slot]
        return ended

    def sample(self, num_updates: int, batch_size: int) -> AnyTransition:
        """Draw minibatches.

        Args:
            num_updates: minibatches, U; 0 gives an empty batch.
            batch_size: rows of each, B.

        Returns:
            A `Transition` of leading shape (U, B), or a `MaskedTransition` with action masks.
        """
        shape, size = (num_updates, batch_size), num_updates * batch_size
        rows, weight = self.sampler.draw(size, num_updates) if num_updates else (np.zeros(0, int), torch.ones(0))
        reward, discount, last = sum_rewards(rows, self._rows, self.num_envs, self._gamma_power)
        # the next time step of the same environment is N rows later
        following = last + self.num_envs
        observation, next_observation = self._observed(rows, following, shape)
        batch = Transition(
            observation=observation,
            action=torch.from_numpy(self._rows["action"].take(rows).reshape(shape)),
            reward=torch.from_numpy(reward.reshape(shape)),
            discount=torch.from_numpy(discount.reshape(shape)),
            next_observation=next_observation,
            weight=weight.view(shape),
            index=torch.from_numpy(rows.reshape(shape)),
        )
        mask = self._rows.get("action_mask")
        if mask is None:
            return batch
        masks = (mask.take(rows, 0), mask.take(following, 0, mode="wrap"))
        return MaskedTransition(*batch, *(torch.from_numpy(each.reshape(*shape, mask.shape[1])) for each in masks))

    def _observed(
        self, rows: NDArray[np.int64], following: NDArray[np.int64], shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the observations of rows and of the rows that follow them, (U, B, ...) each."""
        if self._stacks is None:
            return self._observations.take(rows, shape), self._observations.take(following, shape)
        if self.n_step == 1:
            return self._stacks.take_both(rows, shape)
        return self._stacks.take(rows, shape), self._stacks.take(following, shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows and positions as tensors and plain values.

        Rows in RAM are views, so that saving does not double the memory: save or copy them before the next `append`.
        """
        # the slot at the cursor already has an observation
        used = min(self._steps + 1, self._slots)
        rows = {name: torch.from_numpy(array[:used]) for name, array in self._written.items()}
        return {
            "rows": {"observation": self._observations.state(used), **rows},
            "slots": self._slots,
            "n_step": self.n_step,
            "frame_stack": self.frame_stack,
            "cursor": self._cursor,
            "steps": self._steps,
            "after_end": torch.from_numpy(self._after_end.copy()),
            "drawable": torch.from_numpy(self._drawable.copy()),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, from any device or folder.

        Raises:
            CheckpointError: if the capacity, number of environments, spaces, n_step, frame_stack or sampler differ, or
                positions contradict each other.
        """
        check_memory_state(state, self.state_dict())
        rows = state["rows"]
        self._observations.load(rows["observation"])
        for name, array in self._written.items():
            array[: len(rows[name])] = rows[name].numpy()
        self._cursor, self._steps = state["cursor"], state["steps"]
        self._after_end = state["after_end"].numpy().copy()
        self._drawable[:] = state["drawable"].numpy()
        self.sampler.load_state_dict(state["sampler"])

    def refill(self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int) -> None:
        """Load this rank's shard of the memories of another world size; `begin` continues the stream.

        See `distributed.reshard`. A prioritized sampler loads the priorities, but keeps beta and random generator.

        Args:
            states: `state_dict` of the memory of each old rank; this memory must be new.
            rank: this rank.
            world_size: number of ranks now.

        Raises:
            CheckpointError: as from `load_state_dict`, except that the capacity may differ.
        """
        assert not self._steps, "the memory must be new"
        for state in states:
            check_memory_state(state, self.state_dict(), same_size=False)
        priorities, end = np.zeros((self._slots, self.num_envs)), 0
        # slots that can be drawn, without those for earlier frames
        room = self._slots - self.frame_stack + 1
        for piece in reshard(states, rank=rank, world_size=world_size, slots=room):
            start, end = end, end + len(piece["playable"])
            self._observations.load(torch.from_numpy(piece["observation"]), start)
            for name, array in self._written.items():
                array[start:end] = piece[name]
            priorities[start:end] = piece.get("priority", 0.0)
        # the last row has the current observation, and the n - 1 before it lack rewards, as in `_advance`
        self._steps = self._cursor = max(end - 1, 0)
        playable = self._written["playable"][: max(end - self.n_step, 0)]
        self._drawable[: len(playable)] = playable.sum(1)
        rows = np.flatnonzero(playable)
        self.sampler.load_priorities(rows, priorities.ravel()[rows], [state["sampler"] for state in states])
