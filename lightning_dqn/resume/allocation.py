"""Bounds what a model that a checkpoint describes may allocate: a line in a file can ask for more than all RAM."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_dqn._compat.torch import FactoryCalls
from lightning_dqn.resume.content import check_dict, invalid

# A module holds its weights, and for a moment copies of them and those of its optimizer.
COPIES, SPARE_BYTES, SPARE_TENSORS = 16, 2**26, 4096


class AllocationLimit(FactoryCalls):  # type: ignore[no-untyped-call]
    """While it is entered, new tensors may take so many bytes as a module with the weights of a checkpoint needs.

    Args:
        checkpoint: whose weights bound what a module made from it takes.

    Raises:
        CheckpointError: from the call that would allocate more.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        super().__init__(self._count)
        weights = [t for t in check_dict(checkpoint.get("state_dict"), "state_dict").values() if type(t) is Tensor]
        self._bytes = COPIES * sum(tensor.nbytes for tensor in weights) + SPARE_BYTES
        self._tensors = COPIES * len(weights) + SPARE_TENSORS

    def _count(self, size: Sequence[int]) -> None:
        # most are of 4 bytes an element
        self._bytes -= 4 * math.prod(size)
        self._tensors -= 1
        if self._bytes < 0 or self._tensors < 0:
            invalid("agent.model", "describes a larger network than state_dict holds the weights of")
