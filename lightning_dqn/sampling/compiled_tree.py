"""The sum tree compiled: the same additions in the same order, so the same to the bit. Clever, and only here.

`SumTree` makes some ten numpy calls a level, so that a draw and the write of its priorities take as long as dozens of
uniform draws. Here each is one call of C++, through ctypes, which hands over a single pointer: to a record of where the
tree and two buffers lie, filled in once. The source is compiled, in a tenth of a second, when the first priorities of a
process are stored, and kept nowhere: so there is no cache to go stale or to be tampered with. Where there is no
compiler, numpy does the same.
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
# products and sums are rounded one by one, as numpy does
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
    """A `SumTree` whose `find`, `fill` and `change` are compiled; see there for what they do.

    Args:
        size: leaves that are used.

    Raises:
        OSError: if there is no compiler, or what it makes can't be loaded.
        subprocess.SubprocessError: if it fails.
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
        self._make_room(128)

    def _make_room(self, count: int) -> None:
        self._rows, self._values = np.zeros(count, np.int64), np.zeros(count)
        self._call.rows = self._rows.ctypes.data_as(ctypes.POINTER(ctypes.c_longlong))
        self._call.values = self._values.ctypes.data_as(ctypes.POINTER(ctypes.c_double))

    def _prepare(self, count: int) -> None:
        if count > len(self._rows):
            self._make_room(count)
        self._call.count = count

    def total(self) -> float:
        """The sum of all leaves."""
        total: float = self.nodes.item(0)
        return total

    def find(self, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The leaves, (n,), in which (n,) points lie, and their numbers, (n,)."""
        count = len(points)
        self._prepare(count)
        self._values[:count] = points
        self._find(self._pointer)
        return self._rows[:count].copy(), self._values[:count].copy()

    def fill(self, rows: NDArray[np.int64], value: float) -> None:
        """Set (n,) leaves to one number."""
        count = len(rows)
        self._prepare(count)
        self._rows[:count] = rows
        self._values[:count] = value
        if self._fill(self._pointer):
            self._tree.fill(rows, value)  # which says what is wrong

    def change(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Give (n,) leaves new numbers, but for those that are 0."""
        count = len(rows)
        self._prepare(count)
        self._rows[:count] = rows
        self._values[:count] = values
        if self._change(self._pointer):
            self._tree.change(rows, values)


@functools.cache
def load_library() -> ctypes.CDLL:
    """Compile the source, by the compiler that `CXX` names, and load it; once a process."""
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
    """A compiled tree, or a plain one and a line of information where that can't be had.

    Args:
        size: leaves that are used.
    """
    try:
        return CompiledTree(size)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        rank_zero_info(f"Priorities are kept without compiled code: {why}. The draws are the same, and slower.")
    return SumTree(size)
