"""The memory that learning draws from: a stream of env steps.

Second station in the way of the data: `data.ReplayDataset` appends, `ReplayMemory.sample` yields `Transition`s; which
rows they are made of is a sampler's choice, where observations lie that of `storage`. Legend: U updates, B batch, N
envs, n rewards summed, k frames in a stack.
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
    """One batch, or U of them with a leading dimension: what the learner needs, and nothing it must look up.

    Attributes:
        observation: (U, B, ...) s.
        action: (U, B) a, as the environment takes it, int64.
        reward: (U, B) r_1 + gamma r_2 + ... of the k <= n rewards up to the episode's end.
        discount: (U, B) gamma^k (1 - terminated), the weight of the value of next_observation.
        next_observation: (U, B, ...) s' after those k steps.
        weight: (U, B) importance weight of the row in the loss.
        index: (U, B) row in the memory, for samplers that learn from the error.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    weight: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a batch

    @property
    def action_mask(self) -> Tensor | None:
        """All actions are allowed."""
        return None

    @property
    def next_action_mask(self) -> Tensor | None:
        """All actions are allowed."""
        return None


class MaskedTransition(NamedTuple):
    """A `Transition` of an environment that does not allow every action everywhere.

    Attributes:
        action_mask: (U, B, A) which actions s allowed.
        next_action_mask: (U, B, A) which actions s' allows.
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
    """Chooses rows of the memory; rows enter and leave it in the order of time.

    A subclass inherits what only prioritized samplers need: the methods below `load_state_dict`, which here do nothing.

    Attributes:
        uses_priorities: whether `callbacks.PriorityUpdate` must write priorities and set `beta`.
        beta: exponent of the importance weights, in [0, 1].
    """

    uses_priorities: bool = False
    beta: float = 1.0

    @abstractmethod
    def __len__(self) -> int:
        """Rows that can be drawn."""

    @abstractmethod
    def add(self, rows: NDArray[np.int64]) -> None:
        """Make rows (n,) eligible; they are newer than all before."""

    @abstractmethod
    def drop_oldest(self, count: int) -> None:
        """Remove the `count` oldest rows."""

    @abstractmethod
    def draw(self, size: int, minibatches: int = 1) -> tuple[NDArray[np.int64], Tensor]:
        """Rows (size,) of `minibatches` minibatches, and their importance weights (size,)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def bytes_per_row(self) -> int:
        """RAM that the sampler needs for each row of the memory."""
        return 8

    def update_priorities(self, rows: NDArray[np.int64], priorities: NDArray[Any]) -> None:  # noqa: B027  optional
        """Store new priorities (n,) of rows (n,)."""

    def local_stats(self, minibatches: int) -> NDArray[np.float64]:
        """Statistics (K,) of this rank that other ranks need for global importance weights."""
        return np.zeros(0)

    def apply_global_stats(self, stats: NDArray[np.float64]) -> NDArray[np.float32] | None:
        """Use the statistics (W, K) of all ranks; returns factors (U,) of the weights drawn last, None for 1."""
        return None

    def load_priorities(self, rows: NDArray[np.int64], priorities: NDArray[np.float64], states: Sequence[Any]) -> None:
        """Make rows (n,) eligible with the priorities (n,) that the samplers with these states had for them."""
        self.add(rows)


# makes a sampler for so many rows, from a seed
SamplerCallable = Callable[[int, int | np.random.SeedSequence], Sampler]


class UniformSampler(Sampler):
    """Every row of the memory with the same chance, with replacement, in constant time.

    Args:
        capacity: rows that may be eligible at once.
        seed: of the draws.
    """

    def __init__(self, capacity: int, seed: int | np.random.SeedSequence) -> None:
        self._queue = RowQueue(capacity)
        self._rng = np.random.default_rng(seed)
        self._ones = torch.ones(0)

    def __len__(self) -> int:
        return self._queue.count

    def add(self, rows: NDArray[np.int64]) -> None:
        """Make these rows eligible; they are newer than all before."""
        self._queue.add(rows)

    def drop_oldest(self, count: int) -> None:
        """Forget the `count` rows that entered first."""
        self._queue.drop_oldest(count)

    def draw(self, size: int, minibatches: int = 1) -> tuple[NDArray[np.int64], Tensor]:
        """Rows, (size,), and their importance weights, (size,); of how many minibatches makes no difference here."""
        queue = self._queue
        picks = self._rng.integers(queue.count, size=size)
        if len(self._ones) != size:
            self._ones = torch.ones(size)
        return queue.rows.take(queue.first + picks, mode="wrap"), self._ones

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on, as tensors and plain values."""
        return {**self._queue.state_dict(), "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._queue.load_state_dict(state)
        self._rng.bit_generator.state = state["rng"]


def sum_rewards(
    starts: NDArray[np.int64], rows: Mapping[str, NDArray[Any]], num_envs: int, gamma_power: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Rewards summed from each start on, the discount behind them, and the row of the last reward.

    Args:
        starts: (M,) rows.
        rows: reward, terminated and truncated of all rows of the ring; one time step on is num_envs rows on.
        num_envs: environments that write side by side, N.
        gamma_power: (n + 1,) gamma to the power of 0 to n.
    """
    # R = sum_{j < k} gamma^j r_j, where k <= n ends at the episode's end (Hessel et al. 2018, section 3)
    rewards, terminated, truncated = rows["reward"], rows["terminated"], rows["truncated"]
    reward, last, n_step = rewards.take(starts), starts, len(gamma_power) - 1
    if n_step == 1:
        return reward, gamma_power[1] * ~terminated.take(starts), starts
    steps = np.ones_like(starts)
    for k in range(1, n_step):
        goes_on = ~(terminated[last] | truncated[last])
        last = np.where(goes_on, (last + num_envs) % len(rewards), last)
        reward = reward + goes_on * gamma_power[k] * rewards[last]
        steps += goes_on
    # gamma^k (1 - terminated)
    return reward, gamma_power[steps] * ~terminated[last], last


class ReplayMemory:
    """The last env steps of N environments, one row a time step and environment.

    A row is `observation, action, reward, terminated, truncated`; the next observation is the next row's. In the row
    after an episode's end stands its last observation, whose action the environment ignores (Gymnasium's NEXT_STEP
    autoreset): that row is never drawn as a start. Rows are ordered by time: row = slot * N + environment.

    Of observations that are stacks of frames, oldest first, each row keeps the newest frame, and `sample` makes the
    stacks. Before an episode's first frame they must hold zeros, as Gymnasium's `FrameStackObservation(env, k,
    padding_type="zero")` and the native vector environments of ale_py give them.

    Args:
        capacity: transitions kept, over all environments; the row after each episode's end counts as one.
        num_envs: environments that write side by side, N.
        observation_space: space of one observation, (k, ...) if that is a stack.
        gamma: discount of one step.
        n_step: rewards summed before the value is trusted, n >= 1.
        frame_stack: frames in an observation, k; 1 keeps observations as they are.
        device: where observations are stored and gathered; the other columns stay in RAM.
        folder: where observations are memory-mapped from an unlinked temporary file; by default they are in RAM.
        mask_size: actions of which the environments say which are allowed, A; 0 where all always are.
        sampler: makes what chooses the rows, of the number of rows and the seed.
        seed: of the sampler.

    Raises:
        ValueError: if observations are no such stacks, or there is no such place for them.
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
        # the newest slot waits for its action and the n - 1 before it for their rewards: none of them can be drawn; the
        # k - 1 oldest hold frames for those after them
        self._slots = -(-capacity // num_envs) + n_step + frame_stack - 1
        slots = (self._slots, num_envs)
        shape, dtype = stored_form(observation_space, frame_stack)
        self._observations = make_storage(slots + shape, dtype, device, folder)
        # arrays of zeros cost no memory before they are written, and show nobody what lay there before
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
        # the same memory row by row, for reading: numpy's calls cost a fraction of torch's
        self._rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in self._written.items()}
        self._cursor = 0
        self._steps = 0
        self._after_end = np.zeros(num_envs, dtype=np.bool_)
        self._drawable = np.zeros(self._slots, dtype=np.int64)
        self._gamma_power = np.array([gamma**k for k in range(n_step + 1)], np.float32)
        self.sampler = sampler(self._slots * num_envs, seed)

    def __len__(self) -> int:
        """Transitions that can be drawn now."""
        return len(self.sampler)

    def begin(self, observation: NDArray[Any], action_mask: NDArray[np.bool_] | None = None) -> None:
        """Start the stream, or start it anew after an interruption.

        Episodes that were under way are kept as truncated, never as terminated: their values still bootstrap.

        Args:
            observation: (N, ...) first observations of episodes; (N, k, ...) stacks.
            action_mask: (N, A) which actions they allow, if the memory keeps that.

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
        """Mark the episodes under way as truncated; the next `append` stores the steps that reset them.

        Args:
            mask: (N,) of which environments.
        """
        if self._steps:
            last = (self._cursor - 1) % self._slots
            self._written["truncated"][last] |= mask & self._written["playable"][last] & ~self._ended(last)
        self._after_end |= mask

    def append(  # noqa: PLR0917  what an environment gives, in its order
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
            action: (N,) what was given to each environment.
            reward: (N,) what came back.
            terminated: (N,) whether the episode reached its end.
            truncated: (N,) whether it was cut off.
            next_observation: (N, ...) what was seen next, (N, k, ...) stacks; the true last observation where an
                episode ended.
            next_action_mask: (N, A) which actions it allows, if the memory keeps that.
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
        """Lay what was seen where the next step begins."""
        self._observations.write(self._cursor, observation if self._stacks is None else observation[:, -1])
        if action_mask is not None:
            self._written["action_mask"][self._cursor] = action_mask

    def _advance(self, playable: NDArray[np.bool_]) -> None:
        """Close the slot at the cursor, let the start n - 1 slots before it be drawn, and free the next slot."""
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
            A `Transition` of leading shape (U, B), or a `MaskedTransition` where not all actions are always allowed.
        """
        shape, size = (num_updates, batch_size), num_updates * batch_size
        rows, weight = self.sampler.draw(size, num_updates) if num_updates else (np.zeros(0, int), torch.ones(0))
        reward, discount, last = sum_rewards(rows, self._rows, self.num_envs, self._gamma_power)
        # one row on stands the next time step of the same environment
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
        """What was seen in rows and in those that follow them, (U, B, ...) each."""
        if self._stacks is None:
            return self._observations.take(rows, shape), self._observations.take(following, shape)
        if self.n_step == 1:
            return self._stacks.take_both(rows, shape)
        return self._stacks.take(rows, shape), self._stacks.take(following, shape)

    def state_dict(self) -> dict[str, Any]:
        """Stored rows and positions, as tensors and plain values.

        The rows are those that were written, and the memory's own, not copies, so that saving them does not take their
        room twice: write them, or copy them, before the next `append`. Only from a device are observations copied.
        """
        # the slot at the cursor has an observation already
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
        """Continue where `state_dict` was taken, wherever the observations lay then.

        Raises:
            CheckpointError: if the rows are of another shape or type, as with another capacity or number of
                environments, of another sampler, number of steps or frames, or if positions contradict each other.
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

        `distributed.reshard` describes the shards and what is lost. A prioritized sampler loads the priorities,
        but keeps its own beta and random generator.

        Args:
            states: of all those ranks, as `state_dict` gave them; this memory must be new.
            rank: this one, among as many as there are now.
            world_size: how many these are.

        Raises:
            CheckpointError: as from `load_state_dict`, but that the capacity may be another.
        """
        assert not self._steps, "the memory must be new"
        for state in states:
            check_memory_state(state, self.state_dict(), same_size=False)
        priorities, end = np.zeros((self._slots, self.num_envs)), 0
        # as many as can all be drawn, none for its frame only
        room = self._slots - self.frame_stack + 1
        for piece in reshard(states, rank=rank, world_size=world_size, slots=room):
            start, end = end, end + len(piece["playable"])
            self._observations.load(torch.from_numpy(piece["observation"]), start)
            for name, array in self._written.items():
                array[start:end] = piece[name]
            priorities[start:end] = piece.get("priority", 0.0)
        # the last row is what was seen last: it stands at the cursor, and the n - 1 before it wait as in `_advance`
        self._steps = self._cursor = max(end - 1, 0)
        playable = self._written["playable"][: max(end - self.n_step, 0)]
        self._drawable[: len(playable)] = playable.sum(1)
        rows = np.flatnonzero(playable)
        self.sampler.load_priorities(rows, priorities.ravel()[rows], [state["sampler"] for state in states])
