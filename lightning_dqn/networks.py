"""Networks from an observation to one value an action: what `module.DQN` holds twice."""

import itertools
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
        starts: list[int] = []
        self.num_categories: list[int] = []
        if isinstance(space, spaces.Box):
            if space.dtype == np.uint8 and len(space.shape) >= 2:
                raise TypeError(
                    f"observation_space is an image, {space}: an MLP can't see; "
                    "choose an environment with vector observations (images need a convolutional network)"
                )
            self.num_features = int(np.prod(space.shape))
        elif isinstance(space, spaces.Discrete):
            starts, self.num_categories = [int(space.start)], [int(space.n)]
            self.num_features = int(space.n)
        elif isinstance(space, spaces.MultiDiscrete):
            starts = np.asarray(space.start).ravel().tolist()
            self.num_categories = np.asarray(space.nvec).ravel().tolist()
            self.num_features = sum(self.num_categories)
        else:
            raise TypeError(
                f"observation_space {space} is not supported: use a Box, Discrete or MultiDiscrete space, "
                "or wrap the environment so that it gives one"
            )
        self.register_buffer("starts", torch.tensor(starts), persistent=False)
        self.starts: Tensor

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, num_features) rows; boxes keep their type, one-hot rows are integers."""
        if not self.num_categories:
            return observation.flatten(1)
        category = observation.reshape(len(observation), -1) - self.starts
        return torch.cat([F.one_hot(category[:, i], n) for i, n in enumerate(self.num_categories)], dim=1)


class MLP(nn.Module):
    """A multilayer perceptron with ReLU between its layers.

    Args:
        observation_space: space of one observation.
        num_actions: number of actions, the width of the output.
        hidden_sizes: units of each hidden layer, first to last; an empty list makes a linear model.
        layer_norm: whether each hidden layer is normalised before its ReLU (Ba et al. 2016).

    Raises:
        TypeError: if the space can't be encoded as a vector.
        ValueError: if a hidden size is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space[object],
        num_actions: int,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if any(size <= 0 for size in hidden_sizes):
            raise ValueError(f"hidden_sizes={list(hidden_sizes)}: every layer needs at least 1 unit")
        self.encode = ObservationEncoder(observation_space)
        widths = [self.encode.num_features, *hidden_sizes]
        hidden: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            hidden += [nn.Linear(inputs, outputs), *[nn.LayerNorm(outputs)] * layer_norm, nn.ReLU()]
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(widths[-1], num_actions)
        self._linear = (*(layer for layer in hidden if isinstance(layer, nn.Linear)), self.output)
        self._linear_in_a_row = not layer_norm
        self._seen: list[int] = []
        self._arrays: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values."""
        features = self.encode(observation).to(self.output.weight.dtype)
        values: Tensor = self.output(self.hidden(features))
        return values

    def forward_numpy(self, observation: NDArray[Any]) -> NDArray[Any] | None:
        """The same values for a few boxes, without gradient: numpy's calls cost a fraction of torch's.

        Nothing where there is more than linear layers, or the parameters are not on the CPU, in float32.
        """
        if not self._linear_in_a_row:
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
