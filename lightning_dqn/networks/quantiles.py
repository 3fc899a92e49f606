"""Turns a network with action values into an implicit quantile network, for `variants.IQN`.

Legend: B batch, A actions, Z quantiles, F features.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImplicitQuantiles(nn.Module):
    """A network that returns the quantiles at given levels (IQN, Dabney et al. 2018, section 3.1).

    Args:
        net: network with `features`, (B, ...) to (B, F), `head`, (B, F) to (B, A), and F as `num_features`, like `MLP`.
        num_cosines: number of cosine features of a level.

    Raises:
        TypeError: if the network lacks one of these.
    """

    def __init__(self, net: nn.Module, *, num_cosines: int = 64) -> None:
        super().__init__()
        for name in ("features", "head", "num_features"):
            if not hasattr(net, name):
                raise TypeError(
                    f"network {type(net).__qualname__} has no {name}: IQN needs features(observation), head(features) "
                    "and num_features; use MLP or a convolutional network of this package"
                )
        self.net: Any = net
        self.num_cosines = num_cosines
        self.embedding = nn.Linear(num_cosines, net.num_features)  # type: ignore[arg-type]

    def forward(self, observation: Tensor, levels: Tensor) -> Tensor:
        """(B, ...) observations and (B, Z) levels in [0, 1] to (B, A, Z) quantiles."""
        features = self.net.features(observation)
        # phi_f(tau) = ReLU(sum_{i < n} cos(pi i tau) w_if + b_f)  (eq. 4)
        # in half precision the argument of the fastest cosine would be off by half a radian
        exact = torch.promote_types(features.dtype, torch.float32)
        frequencies = math.pi * torch.arange(self.num_cosines, dtype=exact, device=features.device)
        cosines = torch.cos(levels.to(exact).unsqueeze(2) * frequencies)
        phi = F.relu(self.embedding(cosines.to(self.embedding.weight.dtype)))
        # Z_tau(s, a) = f(psi(s) * phi(tau))_a
        quantiles = self.net.head((features.unsqueeze(1) * phi).flatten(0, 1))
        return quantiles.unflatten(0, levels.shape).transpose(1, 2)  # type: ignore[no-any-return]
