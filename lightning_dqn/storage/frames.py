"""Builds stacks of frames at sampling time, so each frame is stored once instead of in k stacks.

Legend: U updates, B batch, N envs, k frames in a stack, M = U B rows.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.storage.arrays import Storage


class FrameStacks:
    """Builds a stack from its row and the k - 1 time steps before, with zeros before the start of the episode.

    Args:
        frame_stack: frames in a stack, k > 1.
        num_envs: number of environments, N.
        storage: storage of the frames, (slots, N, ...).
        age: (slots, N) number of earlier frames of the same episode, at most k - 1.
    """

    def __init__(self, *, frame_stack: int, num_envs: int, storage: Storage, age: NDArray[np.uint8]) -> None:
        self._before = frame_stack - 1
        self._storage = storage
        self._age = age
        # row offsets from k - 1 time steps before a row to one after it
        self._offsets = num_envs * np.arange(-self._before, 2)

    def begin(self, slot: int, observation: NDArray[Any]) -> None:
        """Begin all episodes in this slot, with (N, k, ...) stacks.

        Raises:
            ValueError: if the frames before the first are not zeros.
        """
        if observation[:, :-1].any():
            raise ValueError(
                f"frame_stack={self._before + 1}: before an episode's first frame its stack must hold zeros; use "
                'FrameStackObservation(..., padding_type="zero")'
            )
        self._age[slot] = 0

    def follow(self, slot: int, next_slot: int, after_end: NDArray[np.bool_]) -> None:
        """Continue the episodes in the next slot, except those, (N,), that ended in this one."""
        self._age[next_slot] = np.where(after_end, 0, np.minimum(self._age[slot], self._before - 1) + 1)

    def take(self, rows: NDArray[np.int64], lead: tuple[int, ...]) -> Tensor:
        """The stacks that end at (M,) rows, (*lead, k, ...)."""
        return self._gather(rows, lead, self._before + 1)

    def take_both(self, rows: NDArray[np.int64], lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The stacks that end at (M,) rows and one time step later in the same episodes, (*lead, k, ...) each.

        Both are views of k + 1 frames, of which they share k - 1. This takes a quarter less time, even if they are
        copied to pinned memory later.
        """
        frames = self._gather(rows, lead, self._before + 2)
        along, count = len(lead), self._before + 1
        return frames.narrow(along, 0, count), frames.narrow(along, 1, count)

    def _gather(self, rows: NDArray[np.int64], lead: tuple[int, ...], count: int) -> Tensor:
        """`count` frames from k - 1 time steps before (M,) rows, (*lead, count, ...)."""
        age = self._age.take(rows, mode="wrap")
        blank = None
        if np.count_nonzero(age < self._before):
            # frame j is k - 1 - j time steps before the row
            blank = (np.arange(self._before, self._before - count, -1) > age[:, None]).ravel().nonzero()[0]
        around = rows[:, None] + self._offsets[:count]
        return self._storage.take(around.ravel(), (*lead, count), blank)
