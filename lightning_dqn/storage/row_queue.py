"""Rows in the order of time."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class RowQueue:
    """A ring of rows, oldest first: they enter and leave in the order of time.

    Args:
        capacity: rows that may be in it at once.

    Attributes:
        rows: the ring, (capacity,).
        first: place of the oldest row.
        count: rows that are in it.
    """

    def __init__(self, capacity: int) -> None:
        self.rows = np.zeros(capacity, dtype=np.int64)
        self.first = 0
        self.count = 0

    def add(self, rows: NDArray[np.int64]) -> None:
        """Let these rows in, which are newer than all before."""
        start = (self.first + self.count) % len(self.rows)
        room = len(self.rows) - start
        if len(rows) <= room:
            self.rows[start : start + len(rows)] = rows
        else:
            self.rows[start:] = rows[:room]
            self.rows[: len(rows) - room] = rows[room:]
        self.count += len(rows)

    def oldest(self, count: int) -> NDArray[np.int64]:
        """The `count` rows that entered first, (count,)."""
        return self.rows.take(range(self.first, self.first + count), mode="wrap")

    def drop_oldest(self, count: int) -> None:
        """Forget the `count` rows that entered first."""
        self.first = (self.first + count) % len(self.rows)
        self.count -= count

    def state_dict(self) -> dict[str, Any]:
        """The ring and its places."""
        return {"ring": torch.from_numpy(self.rows.copy()), "first": self.first, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.rows[:] = state["ring"].numpy()
        self.first, self.count = state["first"], state["count"]
