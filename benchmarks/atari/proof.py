"""That a loop has learnt while its speed was measured: its weights have moved."""

import torch
from torch import Tensor, nn

from benchmarks.atari.work import LEAST_MOVED


def weights(net: nn.Module) -> Tensor:
    """All weights of a network, copied."""
    return torch.cat([parameter.detach().cpu().flatten() for parameter in net.parameters()])


def moved(before: Tensor, after: Tensor) -> float:
    """How far a weight has moved in the mean.

    Raises:
        RuntimeError: if they stand still: a loop that is fast since it doesn't learn.
    """
    distance = float((after - before).abs().mean())
    if not distance > LEAST_MOVED:
        raise RuntimeError(f"it has not learnt: in the mean a weight has moved by {distance:.3g}")
    return distance
