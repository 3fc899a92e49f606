"""Noisy layers, which explore by noise in their weights instead of epsilon."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NoisyLinear(nn.Linear):
    """A linear layer with factorised Gaussian noise in its weights (Fortunato et al. 2018, section 3).

    Every call in training mode draws new noise, shared by all rows, from torch's generator; in evaluation mode there is
    none. `weight` and `bias` are the means.

    Args:
        in_features: number of inputs, p.
        out_features: number of outputs, q.
        sigma: initial standard deviation of the noise, times sqrt(p).
    """

    def __init__(self, in_features: int, out_features: int, *, sigma: float = 0.5) -> None:
        # as in the paper, torch draws the means from U(-1 / sqrt(p), 1 / sqrt(p))
        super().__init__(in_features, out_features)
        initial = sigma / math.sqrt(in_features)
        self.weight_sigma = nn.Parameter(torch.full_like(self.weight, initial))
        self.bias_sigma = nn.Parameter(torch.full_like(self.bias, initial))

    def forward(self, input: Tensor) -> Tensor:
        """(..., p) inputs to (..., q) outputs."""
        if not self.training:
            return super().forward(input)
        noise_in, noise_out = self._noise(self.in_features), self._noise(self.out_features)
        # y = (mu + sigma * f(e_q) f(e_p)^T) x + mu_b + sigma_b * f(e_q)
        weight = self.weight + self.weight_sigma * torch.outer(noise_out, noise_in)
        return F.linear(input, weight, self.bias + self.bias_sigma * noise_out)

    def _noise(self, size: int) -> Tensor:
        # f(e) = sign(e) sqrt(|e|), e ~ N(0, 1)
        noise = torch.randn(size, dtype=self.weight.dtype, device=self.weight.device)
        return noise.sign() * noise.abs().sqrt()
