"""Normalizes observations by their running mean and variance, which are saved with the weights.

Legend: B batch, W ranks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dqn.resume.content import check_tensor, invalid

EPSILON = 1e-8
LIMIT = 10.0


class ObservationNormalizer(nn.Module):
    """Maps x to (x - mean) / sqrt(variance + 1e-8), clipped to [-10, 10]; to x itself before the first update.

    The statistics are float64 buffers: in float32 a sum of many squares loses the small ones.

    Args:
        space: space of one observation.

    Attributes:
        count: () number of observations so far.
        mean: mean of each entry, with the shape of one observation.
        variance: variance of each entry, with the shape of one observation, without Bessel's correction.

    Raises:
        ValueError: if the space is not a Box of floats.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        if not (isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)):
            raise ValueError(
                f"normalize_observations=True: observation_space {space} is not a Box of floats; use "
                "normalize_observations=False"
            )
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(space.shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(space.shape, dtype=torch.float64))
        self._updated = False
        self.register_load_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]

    def forward(self, observation: Tensor) -> Tensor:
        """(..., *shape) observations to normalized ones of the same dtype."""
        if not self._is_updated():
            return observation
        scale = (self.variance + EPSILON).sqrt()
        return ((observation - self.mean) / scale).clamp_(-LIMIT, LIMIT).to(observation.dtype)

    def forward_numpy(self, observation: NDArray[Any]) -> NDArray[Any]:
        """`forward` for arrays and buffers on the CPU, equal to the bit, with less overhead per call."""
        if not self._is_updated():
            return observation
        normal = (observation - self.mean.numpy()) / np.sqrt(self.variance.numpy() + EPSILON)
        # the ufuncs of `clip`, in half its time
        clipped: NDArray[Any] = np.minimum(np.maximum(normal, -LIMIT), LIMIT)
        return clipped.astype(observation.dtype)

    def _is_updated(self) -> bool:
        # cached once true, since reading the count synchronizes with the GPU
        if not self._updated:
            self._updated = bool(self.count > 0)
        return self._updated

    @torch.no_grad()
    def update(self, observation: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        """Include more observations in the statistics.

        Args:
            observation: (..., *shape), at least one.
            gather: gathers a (K,) vector of each rank to (W, K); None for a single process.
        """
        rows = observation.reshape(-1, *self.mean.shape).double()
        variance, mean = torch.var_mean(rows, 0, correction=0)
        if gather is None:
            self._merge(len(rows), mean, variance)
            return
        moments = torch.cat([torch.full_like(self.count, len(rows))[None], mean.flatten(), variance.flatten()])
        # in rank order, so that the statistics of all ranks are equal to the bit
        for of_rank in gather(moments):
            self._merge(of_rank[0], *(part.view_as(mean) for part in of_rank[1:].chunk(2)))

    def _merge(self, count: Tensor | int, mean: Tensor, variance: Tensor) -> None:
        """Merge the moments of a batch (Chan et al. 1979, with M2 = n v)."""
        # n = n_a + n_b, s = n_b / n, d = m_b - m_a;  m = m_a + s d;  v = (1 - s) v_a + s v_b + s (1 - s) d^2
        share = count / self.count.add_(count)
        delta = mean - self.mean
        self.mean.addcmul_(delta, share)
        self.variance.lerp_(variance, share).addcmul_(delta, delta * (share - share * share))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ObservationNormalizer":
        """Move to another device but keep the dtype: half precision can't count beyond 2,048."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _check_state(module: ObservationNormalizer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Reject invalid statistics in a checkpoint, which would make all values NaN.

    Raises:
        CheckpointError: if a value is not finite, negative where it must not be, or of another shape or dtype.
    """
    for name, buffer in module.named_buffers():
        key = f"{prefix}{name}"
        if key in state_dict:
            value = check_tensor(state_dict[key], f"state_dict.{key}", dtype=buffer.dtype, shape=buffer.shape)
            if name != "mean" and bool((value < 0).any()):
                invalid(f"state_dict.{key}", "is negative")
    module._updated = False
