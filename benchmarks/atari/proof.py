"""Checks that a measured loop has learned: its weights have changed."""

import torch
from torch import Tensor, nn

from benchmarks.atari.work import LEAST_MOVED


def weights(net: nn.Module) -> Tensor:
    """A copy of all weights of a network."""
    return torch.cat([parameter.detach().cpu().flatten() for parameter in net.parameters()])


def moved(before: Tensor, after: Tensor) -> float:
    """Mean absolute change of a weight.

    Raises:
        RuntimeError: if the weights do not change, so the loop does not learn.
    """
    distance = float((after - before).abs().mean())
    if not distance > LEAST_MOVED:
        raise RuntimeError(f"the loop did not learn: the mean change of a weight is {distance:.3g}")
    return distance
