"""The multilayer perceptron: the network for vectors, and the head of the convolutional networks.

Legend: B batch, A actions, Z atoms or quantiles, F features.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dqn.networks.encoder import ObservationEncoder
from lightning_dqn.networks.noisy import NoisyLinear
from lightning_dqn.resume.arguments import record_arguments


@record_arguments
class MLP(nn.Module):
    """A multilayer perceptron with ReLU between its layers.

    Args:
        observation_space: space of one observation.
        outputs: A action values, or (A, Z) values with Z atoms or quantiles per action.
        hidden_sizes: units of each hidden layer, first to last; an empty list makes a linear model.
        dueling: whether to use separate streams for state value and advantages, each with its own last hidden layer
            (Wang et al. 2016).
        noisy: whether all layers are noisy, which replaces epsilon (Fortunato et al. 2018).
        layer_norm: whether to apply layer norm after each hidden layer, before its ReLU (Ba et al. 2016).

    Raises:
        TypeError: if the space can't be encoded as a vector.
        ValueError: if a hidden size is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space[object],
        outputs: int | tuple[int, int],
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        dueling: bool = False,
        noisy: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if any(size <= 0 for size in hidden_sizes):
            raise ValueError(f"hidden_sizes={list(hidden_sizes)}: must be at least 1")
        self.encode = ObservationEncoder(observation_space)
        self.shape = outputs if isinstance(outputs, tuple) else (outputs,)
        self.dueling, self.noisy = dueling, noisy
        widths = [self.encode.num_features, *hidden_sizes]
        body = _layers(widths[:-1], noisy, layer_norm)
        # the last hidden layer is part of the head: each dueling stream has its own, and IQN multiplies its input
        head = [*_layers(widths[-2:], noisy, layer_norm), _linear(widths[-1], math.prod(self.shape), noisy)]
        self.num_features = widths[-2:][0]
        if dueling:
            self.hidden, self.advantage = nn.Sequential(*body), nn.Sequential(*head)
            num_atoms = math.prod(self.shape[1:])
            self.value = nn.Sequential(*_layers(widths[-2:], noisy, layer_norm), _linear(widths[-1], num_atoms, noisy))
        else:
            self.hidden, self.output = nn.Sequential(*body, *head[:-1]), head[-1]
        self._body, self._head = tuple(body), tuple(head)
        sequential = not (dueling or layer_norm or len(self.shape) > 1)
        self._linear = [layer for layer in (*body, *head) if isinstance(layer, nn.Linear)] if sequential else []
        self._pointers: list[int] = []
        self._arrays: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values, or (B, A, Z)."""
        return self.head(self.features(observation))

    def features(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, F) features, the input of the head."""
        features: Tensor = self.encode(observation).to(self._head[-1].weight.dtype)
        for layer in self._body:
            features = layer(features)
        return features

    def head(self, features: Tensor) -> Tensor:
        """(B, F) features to (B, A) action values, or (B, A, Z)."""
        values: Tensor = features
        for layer in self._head:
            values = layer(values)
        if len(self.shape) > 1:
            values = values.reshape(-1, *self.shape)
        if self.dueling:
            # Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')  (Wang et al. 2016, eq. 9)
            state = self.value(features)
            values = state.reshape(-1, 1, *self.shape[1:]) + values - values.mean(1, keepdim=True)
        return values

    def forward_numpy(
        self, observation: NDArray[Any], prepare: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    ) -> NDArray[Any] | None:
        """`forward` in numpy, without gradient: for small batches the overhead of a call is a fraction of torch's.

        Args:
            observation: (B, ...) observations of a Box.
            prepare: applied to the observations before the first layer.

        Returns:
            (B, A) values; None if the network has dueling streams, layer norm, active noise or several values per
            action, or if its parameters are not float32 on the CPU.
        """
        if not self._linear or (self.noisy and self.training):
            return None
        pointers = [each.data_ptr() for layer in self._linear for each in layer.parameters(recurse=False)]
        if pointers != self._pointers:
            # arrays that share the memory of the parameters, rebuilt only when it moves
            self._pointers, weight = pointers, self.output.weight
            shared = weight.device.type == "cpu" and weight.dtype == torch.float32
            layers = self._linear if shared else ()
            self._arrays = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in layers]
        if not self._arrays:
            return None
        values: NDArray[Any] = (observation if prepare is None else prepare(observation)).reshape(len(observation), -1)
        for i, (weights, bias) in enumerate(self._arrays):
            values = values.dot(weights)
            values += bias
            if i < len(self._arrays) - 1:
                np.maximum(values, 0, out=values)
        return values


def _linear(inputs: int, outputs: int, noisy: bool) -> nn.Linear:
    return NoisyLinear(inputs, outputs) if noisy else nn.Linear(inputs, outputs)


def _layers(widths: Sequence[int], noisy: bool, layer_norm: bool) -> list[nn.Module]:
    """Hidden layers from each width to the next, each with layer norm if chosen and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [_linear(inputs, outputs, noisy), *[nn.LayerNorm(outputs)] * layer_norm, nn.ReLU()]
    return layers
