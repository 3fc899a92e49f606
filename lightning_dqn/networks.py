"""Networks from an observation to one value, or one distribution, an action: what `module.DQN` holds twice.

Legend: B batch, A actions, Z atoms or quantiles, F features.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


class ObservationEncoder(nn.Module):
    """Turns stored observations into rows of floats: boxes are flattened, categories become one-hot.

    Has no parameters. `Dict` and `Tuple` observations never come here: `envs.make_env` flattens them.

    Args:
        space: the space of one observation, a `Box`, `Discrete` or `MultiDiscrete`.

    Raises:
        TypeError: if the space is none of these, or an image.
    """

    def __init__(self, space: spaces.Space[object]) -> None:
        super().__init__()
        self.num_features: int
        # numbers, not a tensor: what is compiled may close over no other tensors than its inputs
        self.starts: list[int] = []
        self.num_categories: list[int] = []
        if isinstance(space, spaces.Box):
            if space.dtype == np.uint8 and len(space.shape) >= 2:
                raise TypeError(
                    f"observation_space is an image, {space}: an MLP can't see; "
                    "choose an environment with vector observations (images need a convolutional network)"
                )
            self.num_features = int(np.prod(space.shape))
        elif isinstance(space, spaces.Discrete):
            self.starts, self.num_categories = [int(space.start)], [int(space.n)]
            self.num_features = int(space.n)
        elif isinstance(space, spaces.MultiDiscrete):
            self.starts = np.asarray(space.start).ravel().tolist()
            self.num_categories = np.asarray(space.nvec).ravel().tolist()
            self.num_features = sum(self.num_categories)
        else:
            raise TypeError(
                f"observation_space {space} is not supported: use a Box, Discrete or MultiDiscrete space, "
                "or wrap the environment so that it gives one"
            )

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, num_features) rows; boxes keep their type, one-hot rows are integers."""
        if not self.num_categories:
            return observation.flatten(1)
        columns = observation.reshape(len(observation), -1).long().unbind(1)
        blocks = zip(columns, self.starts, self.num_categories, strict=True)
        # not F.one_hot: it looks at the values, which what is compiled can't
        return torch.cat(
            [
                category.new_zeros(len(category), n).scatter(1, (category - start).unsqueeze(1), 1)
                for category, start, n in blocks
            ],
            dim=1,
        )


class NoisyLinear(nn.Linear):
    """A linear layer that explores: its weights carry factorised Gaussian noise (Fortunato et al. 2018, section 3).

    Every call in training mode draws new noise, one for all rows, from torch's generator; in evaluation there is none.
    `weight` and `bias` are the means.

    Args:
        in_features: inputs, p.
        out_features: outputs, q.
        sigma: standard deviation of the noise at the start, times sqrt(p).
    """

    def __init__(self, in_features: int, out_features: int, *, sigma: float = 0.5) -> None:
        # torch draws the means from U(-1 / sqrt(p), 1 / sqrt(p)), as the paper does
        super().__init__(in_features, out_features)
        start = sigma / math.sqrt(in_features)
        self.weight_sigma = nn.Parameter(torch.full_like(self.weight, start))
        self.bias_sigma = nn.Parameter(torch.full_like(self.bias, start))

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


class MLP(nn.Module):
    """A multilayer perceptron with ReLU between its layers.

    Args:
        observation_space: space of one observation.
        outputs: what a row gives, A values, or (A, Z) where each action has Z atoms or quantiles.
        hidden_sizes: units of each hidden layer, first to last; an empty list makes a linear model.
        dueling: whether state value and advantages are told apart, with a last hidden layer each (Wang et al. 2016).
        noisy: whether noise in every layer explores in place of epsilon (Fortunato et al. 2018).
        layer_norm: whether each hidden layer is normalised before its ReLU (Ba et al. 2016).

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
            raise ValueError(f"hidden_sizes={list(hidden_sizes)}: every layer needs at least 1 unit")
        self.encode = ObservationEncoder(observation_space)
        self.shape = outputs if isinstance(outputs, tuple) else (outputs,)
        self.dueling, self.noisy = dueling, noisy
        widths = [self.encode.num_features, *hidden_sizes]
        body = _layers(widths[:-1], noisy, layer_norm)
        # the last hidden layer belongs to the head: each of two streams has one, and IQN lets its quantiles in before
        head = [*_layers(widths[-2:], noisy, layer_norm), _linear(widths[-1], math.prod(self.shape), noisy)]
        self.num_features = widths[-2:][0]
        if dueling:
            self.hidden, self.advantage = nn.Sequential(*body), nn.Sequential(*head)
            num_atoms = math.prod(self.shape[1:])
            self.value = nn.Sequential(*_layers(widths[-2:], noisy, layer_norm), _linear(widths[-1], num_atoms, noisy))
        else:
            self.hidden, self.output = nn.Sequential(*body, *head[:-1]), head[-1]
        self._body, self._head = tuple(body), tuple(head)
        in_a_row = not (dueling or layer_norm or len(self.shape) > 1)
        self._linear = [layer for layer in (*body, *head) if isinstance(layer, nn.Linear)] if in_a_row else []
        self._seen: list[int] = []
        self._arrays: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values, or (B, A, Z)."""
        return self.head(self.features(observation))

    def features(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, F): what the head takes."""
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

    def forward_numpy(self, observation: NDArray[Any]) -> NDArray[Any] | None:
        """The same values for a few boxes, without gradient: numpy's calls cost a fraction of torch's.

        Nothing where the network is more than layers in a row, or the parameters are not on the CPU, in float32.
        """
        if not self._linear or (self.noisy and self.training):
            return None
        pointers = [
            each.data_ptr() for layer in self._linear for each in layer._parameters.values() if each is not None
        ]
        if pointers != self._seen:
            # arrays that share the parameters' memory, made anew only when that moves
            self._seen, weight = pointers, self.output.weight
            shared = weight.device.type == "cpu" and weight.dtype == torch.float32
            layers = self._linear if shared else ()
            self._arrays = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in layers]
        if not self._arrays:
            return None
        values: NDArray[Any] = observation.reshape(len(observation), -1)
        for i, (weights, bias) in enumerate(self._arrays):
            values = values.dot(weights)
            values += bias
            if i < len(self._arrays) - 1:
                np.maximum(values, 0, out=values)
        return values


class ImplicitQuantiles(nn.Module):
    """A network that gives any quantile it is asked for (IQN, Dabney et al. 2018, section 3.1).

    Args:
        net: has `features`, (B, ...) to (B, F), `head`, (B, F) to (B, A), and F as `num_features`; such as `MLP`.
        num_cosines: functions of the level that its embedding is made of.

    Raises:
        TypeError: if the network can't be taken apart.
    """

    def __init__(self, net: nn.Module, *, num_cosines: int = 64) -> None:
        super().__init__()
        for name in ("features", "head", "num_features"):
            if not hasattr(net, name):
                raise TypeError(
                    f"network {type(net).__qualname__} has no {name}: IQN needs features(observation), head(features) "
                    "and num_features, as MLP has them"
                )
        self.net: Any = net
        self.num_cosines = num_cosines
        self.embedding = nn.Linear(num_cosines, net.num_features)  # type: ignore[arg-type]

    def forward(self, observation: Tensor, levels: Tensor) -> Tensor:
        """(B, ...) observations and (B, Z) levels in [0, 1] to (B, A, Z) values of these quantiles."""
        features = self.net.features(observation)
        # phi_f(tau) = ReLU(sum_{i < n} cos(pi i tau) w_if + b_f)  (eq. 4)
        frequencies = math.pi * torch.arange(self.num_cosines, dtype=features.dtype, device=features.device)
        phi = F.relu(self.embedding(torch.cos(levels.to(features.dtype).unsqueeze(2) * frequencies)))
        # Z_tau(s, a) = f(psi(s) * phi(tau))_a
        quantiles = self.net.head((features.unsqueeze(1) * phi).flatten(0, 1))
        return quantiles.unflatten(0, levels.shape).transpose(1, 2)  # type: ignore[no-any-return]


def _linear(inputs: int, outputs: int, noisy: bool) -> nn.Linear:
    return NoisyLinear(inputs, outputs) if noisy else nn.Linear(inputs, outputs)


def _layers(widths: Sequence[int], noisy: bool, layer_norm: bool) -> list[nn.Module]:
    """Hidden layers from each width to the next, with what stands behind them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [_linear(inputs, outputs, noisy), *[nn.LayerNorm(outputs)] * layer_norm, nn.ReLU()]
    return layers
