"""A sum tree (Schaul et al. 2016, B.2.1) in numpy: the reference and the fallback of `compiled_tree`."""

import numpy as np
from numpy.typing import NDArray

# children of a node: eight float64 fill a cache line, so a level costs one memory access instead of the three of three
# binary levels
FAN_OUT = 8


class SumTree:
    """A tree in which each inner node is the sum of its eight children.

    An update or a search by cumulative sum costs one sum per level. An inner node is always recomputed from its
    children, in their order, so rounding errors do not accumulate and the tree is a function of its leaves.

    Args:
        size: number of leaves.

    Attributes:
        nodes: all levels, concatenated from the root; the length of each is a multiple of eight.
        starts: index in `nodes` at which each level begins.
        levels: views of the levels; the children of node i of a level are 8 i to 8 i + 7 of the next.
        leaves: the leaves in the last level, (size,); only the methods may write to them.
    """

    def __init__(self, size: int) -> None:
        groups = [-(-size // FAN_OUT)]
        while groups[0] > 1:
            groups.insert(0, -(-groups[0] // FAN_OUT))
        lengths = FAN_OUT * np.array([1, *groups])
        # zeros take no memory until they are written; align groups with cache lines
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
        """Find the leaf at each point of the cumulative sum, and its value; leaves of 0 are never returned.

        Args:
            points: (n,) in [0, total].

        Returns:
            rows (n,) and values (n,). The tree must not be empty.
        """
        node, rest, all_points = np.zeros(len(points), np.int64), points, np.arange(len(points))
        for level in self.levels[1:]:
            ends = np.add.accumulate(level.reshape(-1, FAN_OUT)[node], axis=1)
            # rounding may lead beyond the last child that is not 0; the children after it have the same end
            child = ((ends <= rest[:, None]) & (ends < ends[:, -1:])).sum(1)
            rest = rest - np.where(child > 0, ends[all_points, child - 1], 0.0)
            node = FAN_OUT * node + child
        return node, self.levels[-1][node]

    def fill(self, rows: NDArray[np.int64], value: float) -> None:
        """Set these leaves to one value.

        Raises:
            IndexError: if there is no such leaf.
        """
        self._check(rows)
        self.leaves[rows] = value
        self._sum_up(rows)

    def change(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Set leaves to values, except leaves that are 0. For repeated leaves the last value counts.

        Args:
            rows: (n,) leaves.
            values: (n,) new values.

        Raises:
            IndexError: if there is no such leaf.
        """
        self._check(rows)
        # numpy guarantees no order for repeated indices
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
            raise IndexError(f"rows must be in [0, {len(self.leaves)}), the rows of the memory")

    def _sum_up(self, rows: NDArray[np.int64]) -> None:
        """Recompute the sums of all ancestors of these leaves."""
        node = rows
        for above, level in zip(self.levels[-2::-1], self.levels[:0:-1], strict=True):
            node = np.unique(node // FAN_OUT)
            above[node] = np.add.accumulate(level.reshape(-1, FAN_OUT)[node], axis=1)[:, -1]
