"""A sum tree (Schaul et al. 2016, B.2.1) in plain numpy: what `compiled_tree` must do, and its stand-in."""

import numpy as np
from numpy.typing import NDArray


class SumTree:
    """Numbers in the leaves of a binary tree whose every inner node is the sum of its two children.

    A change costs one sum a level, and finding the leaf in which a point of the total lies one comparison. An inner
    node is always summed up anew from its children, and nothing is ever added to it or taken from it: rounding errors
    can't pile up, and the tree is a function of its leaves alone.

    Args:
        size: leaves that are used; the tree has the next power of two.

    Attributes:
        nodes: the tree, the root at 1, the children of i at 2 i and 2 i + 1.
        leaves: the part of it that holds the numbers, (size,); written to by the methods only.
    """

    def __init__(self, size: int) -> None:
        self._width = 1 << (size - 1).bit_length()
        # zeros cost no memory before they are written
        self.nodes = np.zeros(2 * self._width)
        self.leaves = self.nodes[self._width : self._width + size]

    def total(self) -> float:
        """The sum of all leaves."""
        return float(self.nodes[1])

    def find(self, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The leaf in whose stretch of the total each point lies, and its number; never one that is 0.

        Args:
            points: (n,) in [0, total], the total itself included.

        Returns:
            rows (n,) and values (n,). The tree must not be empty.
        """
        node, rest = np.ones(len(points), np.int64), points
        for _ in range(self._width.bit_length() - 1):
            left = 2 * node
            mass = self.nodes[left]
            # rounding may lead past the last leaf that holds something: where there is nothing, nobody turns to
            right = (rest >= mass) & (self.nodes[left + 1] > 0)
            rest = rest - right * mass
            node = left + right
        return node - self._width, self.nodes[node]

    def fill(self, rows: NDArray[np.int64], value: float) -> None:
        """Set these leaves to one number.

        Raises:
            IndexError: if there is no such leaf.
        """
        self._check(rows)
        self.leaves[rows] = value
        self._sum_up(rows)

    def change(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Give leaves new numbers, but for those that are 0: they stay so. The last of several for one leaf counts.

        Args:
            rows: (n,) leaves.
            values: (n,) numbers.

        Raises:
            IndexError: if there is no such leaf.
        """
        self._check(rows)
        # numpy does not promise an order where a row is assigned to twice
        last_first, places = np.unique(rows[::-1], return_index=True)
        alive = self.leaves[last_first] > 0
        self.leaves[last_first[alive]] = values[::-1][places[alive]]
        self._sum_up(last_first)

    def load(self, leaves: NDArray[np.float64]) -> None:
        """Set all leaves, (size,)."""
        self.leaves[:] = leaves
        width = self._width
        while width > 1:
            width //= 2
            self.nodes[width : 2 * width] = self.nodes[2 * width : 4 * width].reshape(-1, 2).sum(1)

    def _check(self, rows: NDArray[np.int64]) -> None:
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.leaves)):
            raise IndexError(f"rows must be in [0, {len(self.leaves)}): they are those of the memory")

    def _sum_up(self, rows: NDArray[np.int64]) -> None:
        node = rows + self._width
        for _ in range(self._width.bit_length() - 1):
            node = np.unique(node // 2)
            self.nodes[node] = self.nodes[2 * node] + self.nodes[2 * node + 1]
