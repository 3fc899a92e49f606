"""From what an environment shows to rows of floats: what every `MLP` begins with. Legend: B batch."""

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn


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
                    "use a network with convolutions, such as NatureCNN, or MinAtarCNN for few pixels"
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
