"""A sum tree (Schaul et al. 2016, B.2.1) in plain numpy: what `compiled_tree` must do, and its stand-in."""

import numpy as np
from numpy.typing import NDArray

# children of a node: eight numbers are a line of a CPU's cache, so a level costs one look at memory where a binary
# tree's three levels cost three
FAN_OUT = 8


class SumTree:
    """Numbers in the leaves of a tree whose every inner node is the sum of its eight children.

    An update costs one sum per level, and so does a search by cumulative sum. An inner
    node is always summed up anew from its children, in their order, and nothing is ever added to it or taken from it:
    rounding errors can't pile up, and the tree is a function of its leaves alone.

    Args:
        size: leaves that are used.

    Attributes:
        nodes: all levels one after the other, the root first; each as long as it must be, in whole groups of eight.
        starts: where in it each level begins.
        levels: views of them; the children of a level's node i are 8 i to 8 i + 7 of the next.
        leaves: the part of the last that holds the numbers, (size,); written to by the methods only.
    """

    def __init__(self, size: int) -> None:
        groups = [-(-size // FAN_OUT)]
        while groups[0] > 1:
            groups.insert(0, -(-groups[0] // FAN_OUT))
        lengths = FAN_OUT * np.array([1, *groups])
        # zeros cost no memory before they are written; groups shall begin where lines of the cache do
        space = np.zeros(lengths.sum() + FAN_OUT)
        shift = -space.ctypes.data % (8 * FAN_OUT) // 8
        self.nodes = space[shift : shift + lengths.sum()]
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.levels = np.split(self.nodes, self.starts[1:])
        self.leaves = self.levels[-1][:size]

    def total(self) -> float:
        """The sum of all leaves."""
        total: float = self.nodes.item(0)
        return total

    def find(self, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Find the leaf of each point in the cumulative sum, and its value; a leaf of 0 is never returned.

        Args:
            points: (n,) in [0, total], the total itself included.

        Returns:
            rows (n,) and values (n,). The tree must not be empty.
        """
        node, rest, all_points = np.zeros(len(points), np.int64), points, np.arange(len(points))
        for level in self.levels[1:]:
            ends = np.add.accumulate(level.reshape(-1, FAN_OUT)[node], axis=1)
            # rounding may lead past the last child that holds something: children after it end where it ends
            child = ((ends <= rest[:, None]) & (ends < ends[:, -1:])).sum(1)
            rest = rest - np.where(child > 0, ends[all_points, child - 1], 0.0)
            node = FAN_OUT * node + child
        return node, self.levels[-1][node]

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
        self._sum_up(np.arange(0, len(leaves), FAN_OUT))

    def _check(self, rows: NDArray[np.int64]) -> None:
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.leaves)):
            raise IndexError(f"rows must be in [0, {len(self.leaves)}): they are those of the memory")

    def _sum_up(self, rows: NDArray[np.int64]) -> None:
        """Recompute the sums of all ancestors of these leaves."""
        node = rows
        for above, level in zip(self.levels[-2::-1], self.levels[:0:-1], strict=True):
            node = np.unique(node // FAN_OUT)
            above[node] = np.add.accumulate(level.reshape(-1, FAN_OUT)[node], axis=1)[:, -1]
