"""The memory that learning draws from: a stream of env steps.

Second station in the way of the data: `data.ReplayDataset` appends, `ReplayMemory.sample` yields `Transition`s; which
rows they are made of is a sampler's choice, where observations lie that of `storage`. Legend: U updates, B batch, N
envs, n rewards summed, k frames in a stack.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.replay.dealing import deal
from lightning_dqn.replay.frames import FrameStacks
from lightning_dqn.replay.returns import sum_rewards
from lightning_dqn.replay.samplers import SamplerCallable, UniformSampler
from lightning_dqn.replay.storage import make_storage, stored_form
from lightning_dqn.replay.transition import AnyTransition, MaskedTransition, Transition
from lightning_dqn.resume.memory_state import check_memory_state


class ReplayMemory:
    """The last env steps of N environments, one row a time step and environment.

    A row is `observation, action, reward, terminated, truncated`; the next observation is the next row's. In the row
    after an episode's end stands its last observation, whose action the environment ignores (Gymnasium's NEXT_STEP
    autoreset): that row is never drawn as a start. Rows lie time by time: row = slot * N + environment.

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
        device: where observations lie and are gathered; what else a row holds stays in RAM.
        folder: where observations lie in a nameless file, gone with the process; by default they lie in RAM.
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
        # what lies in the freed slot is also a frame of the k - 1 slots after it
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
        """Take up a share of the memories of another number of ranks, as if it had been played here; `begin` goes on.

        What a share is made of, and what is lost, is said at `dealing.deal`. A prioritised sampler gets the priorities
        too, but keeps its own beta and its own draws.

        Args:
            states: of all those ranks, as `state_dict` gave them; this memory must be new.
            rank: this one, among as many as there are now.
            world_size: how many these are.

        Raises:
            CheckpointError: as from `load_state_dict`, but that the capacity may be another.
        """
        assert not self._steps, "only a new memory takes up a share of others"
        for state in states:
            check_memory_state(state, self.state_dict(), same_size=False)
        priorities, end = np.zeros((self._slots, self.num_envs)), 0
        # as many as can all be drawn, none for its frame only
        room = self._slots - self.frame_stack + 1
        for piece in deal(states, rank=rank, world_size=world_size, slots=room):
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
        inherit = getattr(self.sampler, "inherit", None)
        if inherit is None:
            self.sampler.add(rows)
        else:
            inherit(rows, priorities.ravel()[rows], max(state["sampler"]["largest"] for state in states))
