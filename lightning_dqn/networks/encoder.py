"""Encodes observations as vectors, the first step of every `MLP`. Legend: B batch."""

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn


class ObservationEncoder(nn.Module):
    """Converts observations to vectors: a Box is flattened, categories become one-hot.

    Has no parameters. `envs.make_env` flattens `Dict` and `Tuple` observations before they reach a network.

    Args:
        space: space of one observation, a `Box`, `Discrete` or `MultiDiscrete`.

    Raises:
        TypeError: if the space is another one, or an image.
    """

    def __init__(self, space: spaces.Space[object]) -> None:
        super().__init__()
        # lists, since a compiled function must not close over tensors that are not its inputs
        self.starts: list[int] = []
        self.num_categories: list[int] = []
        if isinstance(space, spaces.Box):
            if space.dtype == np.uint8 and len(space.shape) >= 2:
                raise TypeError(
                    f"observation_space {space} is an image, which MLP does not support: use NatureCNN, or MinAtarCNN "
                    "for small images"
                )
        elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            counts = space.n if isinstance(space, spaces.Discrete) else space.nvec
            self.starts = np.ravel(space.start).tolist()
            self.num_categories = np.ravel(counts).tolist()
        else:
            raise TypeError(
                f"observation_space {space} is not supported: use a Box, Discrete or MultiDiscrete space, "
                "or convert the observations with a wrapper"
            )
        self.num_features = sum(self.num_categories) or int(np.prod(space.shape or ()))

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, num_features); a Box keeps its dtype, one-hot vectors are int64."""
        if not self.num_categories:
            return observation.flatten(1)
        columns = observation.reshape(len(observation), -1).long().unbind(1)
        blocks = zip(columns, self.starts, self.num_categories, strict=True)
        # F.one_hot checks the values, which a compiled function can't
        return torch.cat(
            [
                category.new_zeros(len(category), n).scatter(1, (category - start).unsqueeze(1), 1)
                for category, start, n in blocks
            ],
            dim=1,
        )
