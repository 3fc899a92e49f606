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

# See `SumTree` for what it does and why. All points go down a level before any goes down the next: their reads don't
# wait for each other, as those of one point on its way do. Which child a point lies in no CPU can guess: it is counted
# without branches. That it lies before the end of its node is nearly always so, and worth one.
SOURCE = """
struct Call {
  double *nodes; const long long *starts; long long levels, size;
  long long *rows; double *values; long long count;
};

extern "C" void find(const Call *call) {
  long long *node = call->rows, count = call->count;
  double *rest = call->values;
  for (long long k = 0; k < count; k++) node[k] = 0;
  for (long long i = 1; i < call->levels; i++) {
    const double *level = call->nodes + call->starts[i];
    for (long long k = 0; k < count; k++) {
      const double *children = level + 8 * node[k];
      double ends[9] = {0.0};
      for (int j = 0; j < 8; j++) ends[j + 1] = ends[j] + children[j];
      int child = 0;
      double point = rest[k];
      if (point < ends[8])
        for (int j = 1; j < 8; j++) child += ends[j] <= point;
      else
        for (int j = 1; j < 8; j++) child += ends[j] < ends[8];
      rest[k] -= ends[child];
      node[k] = 8 * node[k] + child;
    }
  }
  const double *leaves = call->nodes + call->starts[call->levels - 1];
  for (long long k = 0; k < count; k++) rest[k] = leaves[node[k]];
}

static long long write(const Call *call, bool also_zeros) {
  long long *node = call->rows, count = call->count;
  double *leaves = call->nodes + call->starts[call->levels - 1];
  for (long long k = 0; k < count; k++)
    if (node[k] < 0 || node[k] >= call->size) return 1;
  for (long long k = 0; k < count; k++)
    if (also_zeros || leaves[node[k]] > 0) leaves[node[k]] = call->values[k];
  for (long long i = call->levels - 1; i > 0; i--) {
    const double *level = call->nodes + call->starts[i];
    double *above = call->nodes + call->starts[i - 1];
    for (long long k = 0; k < count; k++) {
      node[k] >>= 3;
      const double *children = level + 8 * node[k];
      double sum = children[0];
      for (int j = 1; j < 8; j++) sum += children[j];
      above[node[k]] = sum;
    }
  }
  return 0;
}

extern "C" long long fill(const Call *call) { return write(call, true); }
extern "C" long long change(const Call *call) { return write(call, false); }
"""
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
        source, library = Path(folder, "sum_tree.cpp"), Path(folder, "sum_tree.so")
        source.write_text(SOURCE)
        command = [*compiler, *FLAGS, str(source), "-o", str(library)]
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
