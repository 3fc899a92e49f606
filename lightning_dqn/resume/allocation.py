"""Limits the memory that a model in a checkpoint allocates: a damaged or forged file can describe any size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_dqn._compat.torch import FactoryCalls
from lightning_dqn.resume.content import check_dict, invalid

# a module needs its weights and, for a short time, copies of them and its optimizer's state
COPIES, SPARE_BYTES, SPARE_TENSORS = 16, 2**26, 4096


class AllocationLimit(FactoryCalls):  # type: ignore[no-untyped-call]
    """Context manager that limits new tensors to the size that a module with a checkpoint's weights needs.

    Args:
        checkpoint: checkpoint whose `state_dict` determines the limit.

    Raises:
        CheckpointError: raised by the call that would exceed the limit.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        super().__init__(self._count)
        weights = [t for t in check_dict(checkpoint.get("state_dict"), "state_dict").values() if type(t) is Tensor]
        self._bytes = COPIES * sum(tensor.nbytes for tensor in weights) + SPARE_BYTES
        self._tensors = COPIES * len(weights) + SPARE_TENSORS

    def _count(self, size: Sequence[int]) -> None:
        # most elements have 4 bytes
        self._bytes -= 4 * math.prod(size)
        self._tensors -= 1
        if self._bytes < 0 or self._tensors < 0:
            invalid("agent.model", "describes a larger network than state_dict holds the weights of")
