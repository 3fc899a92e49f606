"""What a sampler is, and the uniform one: every row with the same chance."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.replay.row_queue import RowQueue


@runtime_checkable
class Sampler(Protocol):
    """Chooses rows of the memory. Rows enter and leave in the order of time.

    One that learns from errors also has a `beta` and a `write(rows, priorities)`, and for several ranks
    `said(minibatches)`, `heard(said)` and `inherit(rows, numbers, largest)`, see `PrioritizedSampler`.
    """

    def __len__(self) -> int: ...

    def bytes_of_a_row(self) -> int: ...

    def add(self, rows: NDArray[np.int64]) -> None: ...

    def drop_oldest(self, count: int) -> None: ...

    def draw(self, size: int, minibatches: int = 1) -> tuple[NDArray[np.int64], Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# makes a sampler for so many rows, from a seed
SamplerCallable = Callable[[int, int | np.random.SeedSequence], Sampler]


class UniformSampler:
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

    def bytes_of_a_row(self) -> int:
        """RAM that each row of the memory takes here: its place in the queue."""
        return 8

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


def probe_sampler(make: SamplerCallable) -> Sampler:
    """A throwaway sampler, so that a wrong factory is rejected before anything else is made.

    Args:
        make: as a memory will call it.

    Raises:
        TypeError: if what is made is no sampler.
        ValueError: if an argument is out of its range.
    """
    try:
        sampler: Any = make(1, 0)
    except TypeError as error:
        raise TypeError(f"data.sampler={make!r}: can't be called with a capacity and a seed ({error})") from error
    if not isinstance(sampler, Sampler):
        raise TypeError(
            f"data.sampler={make!r}: makes a {type(sampler).__name__}, which is no Sampler; "
            "use lightning_dqn.UniformSampler or lightning_dqn.PrioritizedSampler"
        )
    return sampler
