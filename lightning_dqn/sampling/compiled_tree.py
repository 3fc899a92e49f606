"""A compiled sum tree, with the same additions in the same order as `SumTree`: the results are equal to the bit.

`SumTree` makes about ten numpy calls per level. Here each method is one call of C++ through ctypes with a pointer to
one struct, which is filled in once. The source is compiled in 0.1 s when a process stores its first priorities, and the
library is not cached. Without a compiler, `SumTree` is used.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray

from lightning_dqn.sampling.sum_tree import SumTree

SOURCE = Path(__file__).with_name("sum_tree.cpp")
# round each product and sum, like numpy
FLAGS = ("-x", "c++", "-O3", "-shared", "-fPIC", "-ffp-contract=off")


class _Call(ctypes.Structure):
    _fields_ = (
        ("nodes", ctypes.POINTER(ctypes.c_double)),
        ("starts", ctypes.POINTER(ctypes.c_longlong)),
        ("levels", ctypes.c_longlong),
        ("size", ctypes.c_longlong),
        ("rows", ctypes.POINTER(ctypes.c_longlong)),
        ("values", ctypes.POINTER(ctypes.c_double)),
        ("count", ctypes.c_longlong),
    )


class CompiledTree:
    """A `SumTree` with compiled `find`, `fill` and `change`; see there for their documentation.

    Args:
        size: number of leaves.

    Raises:
        OSError: if there is no compiler, or the library can't be loaded.
        subprocess.SubprocessError: if the compiler fails.
    """

    def __init__(self, size: int) -> None:
        library = load_library()
        self._find, self._fill, self._change = library.find, library.fill, library.change
        self._tree = SumTree(size)
        self.nodes, self.leaves, self.load = self._tree.nodes, self._tree.leaves, self._tree.load
        self._call = _Call(levels=len(self._tree.levels), size=size)
        self._call.nodes = self.nodes.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
        self._call.starts = self._tree.starts.ctypes.data_as(ctypes.POINTER(ctypes.c_longlong))
        self._pointer = ctypes.byref(self._call)
        self._allocate(128)

    def _allocate(self, count: int) -> None:
        self._rows, self._values = np.zeros(count, np.int64), np.zeros(count)
        self._call.rows = self._rows.ctypes.data_as(ctypes.POINTER(ctypes.c_longlong))
        self._call.values = self._values.ctypes.data_as(ctypes.POINTER(ctypes.c_double))

    def _prepare(self, count: int) -> None:
        if count > len(self._rows):
            self._allocate(count)
        self._call.count = count

    def total(self) -> float:
        """The sum of all leaves."""
        total: float = self.nodes.item(0)
        return total

    def find(self, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Leaves, (n,), at (n,) points of the cumulative sum, and their values, (n,)."""
        count = len(points)
        self._prepare(count)
        self._values[:count] = points
        self._find(self._pointer)
        return self._rows[:count].copy(), self._values[:count].copy()

    def fill(self, rows: NDArray[np.int64], value: float) -> None:
        """Set (n,) leaves to one value."""
        count = len(rows)
        self._prepare(count)
        self._rows[:count] = rows
        self._values[:count] = value
        if self._fill(self._pointer):
            self._tree.fill(rows, value)  # raises the error

    def change(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Set (n,) leaves to (n,) values, except leaves that are 0."""
        count = len(rows)
        self._prepare(count)
        self._rows[:count] = rows
        self._values[:count] = values
        if self._change(self._pointer):
            self._tree.change(rows, values)


@functools.cache
def load_library() -> ctypes.CDLL:
    """Compile the source with the compiler in `CXX`, by default c++, and load it; once per process."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    with tempfile.TemporaryDirectory(prefix="lightning_dqn_", ignore_cleanup_errors=True) as folder:
        library = Path(folder, "sum_tree.so")
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(library)]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
        loaded = ctypes.CDLL(str(library))
    for name in ("fill", "change"):
        getattr(loaded, name).restype = ctypes.c_longlong
    loaded.find.restype = None
    return loaded


def make_tree(size: int) -> SumTree | CompiledTree:
    """A compiled tree with `size` leaves, or a `SumTree` and an info message if it can't be compiled."""
    try:
        return CompiledTree(size)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        rank_zero_info(f"Prioritized replay runs without compiled code: {why}. The draws are the same, but slower.")
    return SumTree(size)
