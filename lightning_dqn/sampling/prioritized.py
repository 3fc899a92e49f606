"""Prioritized replay: rows with larger TD errors are drawn more often (Schaul et al. 2016)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.replay import Sampler
from lightning_dqn.sampling.compiled_tree import CompiledTree, make_tree
from lightning_dqn.sampling.sum_tree import SumTree
from lightning_dqn.storage.row_queue import RowQueue


class PrioritizedSampler(Sampler):
    """Draws rows with probabilities proportional to their priorities, with importance weights.

    `callbacks.PriorityUpdate` writes the priorities and sets `beta`. The leaves of the sum tree are p_i^alpha: 1 for
    the first row, and for each later one the maximum so far.

    Args:
        capacity: rows of the memory.
        seed: seed of the draws.
        alpha: exponent of the priorities, in [0, 1]; 0 is uniform replay.
        epsilon: positive number added to every TD error, so that every row can be drawn.

    Attributes:
        beta: exponent of the importance weights, in [0, 1]; 1 corrects the bias fully.

    Raises:
        ValueError: if a value is out of its range.
    """

    uses_priorities = True

    def __init__(
        self, capacity: int, seed: int | np.random.SeedSequence, *, alpha: float = 0.6, epsilon: float = 1e-6
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: must be in [0, 1]; 0 is uniform replay")
        if not 0 < epsilon < np.inf:
            raise ValueError(f"epsilon={epsilon}: must be positive")
        self.alpha = alpha
        self.epsilon = epsilon
        self.beta = 1.0
        self._capacity = capacity
        self._queue = RowQueue(capacity)
        # made with the first row: a sampler that is only inspected does not need the compiler
        self._tree: SumTree | CompiledTree | None = None
        self._largest = 1.0
        self._rng = np.random.default_rng(seed)
        self._strata = np.zeros((1, 0))
        # the minimum p^alpha of each minibatch of the last draw, and the sum of all then
        self._least, self._total = np.full(1, np.inf), 1.0

    def __len__(self) -> int:
        return self._queue.count

    def bytes_per_row(self) -> int:
        """RAM of the sampler per row of the memory: the queue, the leaf and a share of the inner nodes."""
        return 18

    def add(self, rows: NDArray[np.int64]) -> None:
        """Make new rows eligible, with the maximum priority so far."""
        if self._tree is None:
            self._tree = make_tree(self._capacity)
        self._queue.add(rows)
        self._tree.fill(rows, self._largest)

    def drop_oldest(self, count: int) -> None:
        """Remove the `count` oldest rows."""
        if count and self._tree is not None:
            self._tree.fill(self._queue.oldest(count), 0.0)
            self._queue.drop_oldest(count)

    def draw(self, size: int, minibatches: int = 1) -> tuple[NDArray[np.int64], Tensor]:
        """Draw rows by stratified sampling: one from each of B equal segments of the cumulative sum (B.2.1).

        The expected number of draws of a row is that of B independent draws, with less variance.

        Args:
            size: rows in all minibatches.
            minibatches: number of minibatches, with B = size / minibatches rows each.

        Returns:
            rows (size,) and importance weights (size,) with maximum 1 in each minibatch.

        Raises:
            ValueError: if no row is eligible.
        """
        if self._tree is None or not self._queue.count:
            raise ValueError("no row is eligible yet: add some before drawing")
        if self._strata.shape != (minibatches, size // minibatches):
            self._strata = np.tile(np.arange(size / minibatches), (minibatches, 1))
        points = self._rng.random(self._strata.shape)
        points += self._strata
        self._total = self._tree.total()
        points *= self._total / self._strata.shape[1]
        rows, chances = self._tree.find(points.ravel())
        # w_i = (N P(i))^-beta / max_j w_j = (min_j P(j) / P(i))^beta, over the minibatch (section 3.4); N and the sum
        # of the priorities cancel
        chances = chances.reshape(self._strata.shape)
        self._least = np.minimum.reduce(chances, axis=1, keepdims=True)
        ratio: NDArray[np.float64] = self._least / chances
        return rows, torch.from_numpy((ratio.astype(np.float32) ** self.beta).ravel())

    def update_priorities(self, rows: NDArray[np.int64], priorities: NDArray[Any]) -> None:
        """Set the priorities of rows; for repeated rows the last one counts, and removed rows are ignored.

        Args:
            rows: (n,) as drawn.
            priorities: (n,) absolute TD errors.

        Raises:
            FloatingPointError: if a TD error is NaN or infinite.
            IndexError: if the memory has no such row.
        """
        if self._tree is None or not len(rows):
            return
        # P(i) ~ p_i^alpha with p_i = |delta_i| + epsilon (section 3.3)
        powers = (priorities.astype(np.float64) + self.epsilon) ** self.alpha
        largest = float(np.maximum.reduce(powers))
        # also false for NaN
        if not largest < np.inf:
            raise FloatingPointError("a TD error is not finite: lower lr, clip_grad_value or reward_scale")
        self._tree.change(rows, powers)
        self._largest = max(self._largest, largest)

    def local_stats(self, minibatches: int) -> NDArray[np.float64]:
        """Per-rank statistics for global importance weights: max p^alpha, min sampling probability per minibatch.

        Args:
            minibatches: U, drawn last; the probabilities are infinite if another number was drawn.

        Returns:
            (1 + U,) numbers.
        """
        least = self._least.ravel() / self._total
        return np.concatenate([[self._largest], least if len(least) == minibatches else np.full(minibatches, np.inf)])

    def apply_global_stats(self, stats: NDArray[np.float64]) -> NDArray[np.float32]:
        """Apply the gathered statistics of all W ranks: new rows get the global maximum of p^alpha.

        Each of W shards contributes equally many rows to a global minibatch, so row i of a shard with priority sum S is
        drawn with probability p_i / (W S). The importance weights correct for it; their global maximum is 1.

        Args:
            stats: (W, 1 + U) results of `local_stats`.

        Returns:
            (U,) factors for the weights drawn last.
        """
        self._largest = float(stats[:, 0].max())
        # (min_j P(j) / P(i))^beta over all ranks, while `draw` used the minimum of its rank; W cancels
        ratio = stats[:, 1:].min(0) / (self._least.ravel() / self._total)
        factors: NDArray[np.float32] = ratio.astype(np.float32) ** np.float32(self.beta)
        return factors

    def load_priorities(self, rows: NDArray[np.int64], priorities: NDArray[np.float64], states: Sequence[Any]) -> None:
        """Make the first rows eligible, with priorities from the samplers of other ranks.

        Args:
            rows: (n,) oldest first.
            priorities: (n,) p_i^alpha; 0 for rows without one, which get the maximum.
            states: states of those samplers, from `state_dict`.
        """
        self._largest = max(state["largest"] for state in states)
        leaves = np.zeros(self._capacity)
        leaves[rows] = np.where(priorities > 0, priorities, self._largest)
        self._tree = make_tree(self._capacity)
        self._tree.load(leaves)
        self._queue.add(rows)

    def state_dict(self) -> dict[str, Any]:
        """All state that the next draws depend on, as tensors and plain values."""
        leaves = np.zeros(self._capacity) if self._tree is None else self._tree.leaves.copy()
        return {
            **self._queue.state_dict(),
            "priorities": torch.from_numpy(leaves),
            "largest": self._largest,
            "beta": self.beta,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from `state_dict`."""
        self._queue.load_state_dict(state)
        self._tree = make_tree(self._capacity)
        self._tree.load(state["priorities"].numpy())
        self._largest, self.beta = state["largest"], state["beta"]
        self._rng.bit_generator.state = state["rng"]
