"""From stored images to channels of floats, and through convolutions to rows: what every network that sees begins with.

Legend: B batch, C channels, H and W height and width in pixels, k stacked frames, F features.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

Channels = Literal["auto", "first", "last"]


class ImageEncoder(nn.Module):
    """Turns stored images into channels of floats, where the network computes: what travels there stays small.

    A box of bytes up to 255 is divided by 255, once, here. All others become floats as they are: bools 0 and 1, floats
    and other integers in whatever bounds they have.

    The axes are told apart by the shape of the box:

    - (H, W) is one grey frame.
    - Of three axes the channels are the first or the last, whichever is shorter than both others: stacked grey frames
      and (C, H, W), or (H, W, C). A cube of bools has them last, as MinAtar's Seaquest does.
    - Of four axes the first counts stacked frames, and the rest are as above. (k, H, W, C) makes k * C channels, frame
      after frame.

    Has no parameters.

    Args:
        space: a `Box` of images.
        channels: which axis of a frame they are, where its shape does not say so: first, last, or auto to go by it.

    Raises:
        TypeError: if the space is no box of images.
        ValueError: if its shape does not say which axis the channels are, and nobody else does.
    """

    def __init__(self, space: spaces.Space[object], *, channels: Channels = "auto") -> None:
        super().__init__()
        if not isinstance(space, spaces.Box) or len(space.shape) not in {2, 3, 4}:
            raise TypeError(
                f"observation_space {space}: convolutions need a Box of 2 axes (one grey frame), 3 (frames or channels "
                "with it) or 4 (stacked colour frames); use MLP for other observations"
            )
        self.shape = space.shape
        self.scaled = space.dtype == np.uint8 and int(space.high.max()) == 255
        # without the stack, and with the one channel that a grey frame does not mention
        frame = space.shape[-3:] if len(space.shape) > 2 else (1, *space.shape)
        self.channels_last = len(space.shape) > 2 and _channels_are_last(space, frame, channels)
        height, width, num_channels = frame if self.channels_last else (*frame[1:], frame[0])
        self.size = height, width
        self.num_channels = num_channels * math.prod(space.shape[:-3])

    def forward(self, observation: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, ...) observations to (B, C, H, W) floats of a type, with the channels of each pixel side by side."""
        images = observation.movedim(-1, -3) if self.channels_last else observation
        images = images.reshape(len(observation), self.num_channels, *self.size)
        # bytes are cheaper to reorder than floats; so laid out, an update of NatureCNN takes a fifth less time on a
        # CPU, and it is what the matrix units of GPUs want
        images = images.contiguous(memory_format=torch.channels_last).to(dtype)
        return images / 255 if self.scaled else images

    def require(self, smallest: int, owner: str) -> None:
        """Check that frames are large enough for the convolutions.

        Args:
            smallest: pixels that height and width need at least.
            owner: who needs them.

        Raises:
            ValueError: naming shape and remedy.
        """
        if min(self.size) < smallest:
            others = "" if owner == "MinAtarCNN" else "use MinAtarCNN or ImpalaCNN, or "
            raise ValueError(
                f"observation_space of shape {self.shape} has frames of {self.size[0]} x {self.size[1]} pixels, and "
                f"{owner} needs {smallest} x {smallest} at least: {others}enlarge them with "
                "gymnasium.wrappers.ResizeObservation"
            )


class ConvEncoder(nn.Module):
    """Images as stored, through convolutions, to rows.

    Args:
        image: encodes the images.
        layers: from (B, C, H, W) to other channels, heights and widths.
    """

    def __init__(self, image: ImageEncoder, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.image, self.layers = image, nn.Sequential(*layers)
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, *image.shape)).shape[1]

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, F): channel by channel, row by row."""
        dtype = next(self.layers.parameters()).dtype
        features: Tensor = self.layers(self.image(observation, dtype))
        return features.flatten(1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel (Ba et al. 2016), as PQN has it after convolutions."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _channels_are_last(space: spaces.Box, frame: tuple[int, ...], channels: Channels) -> bool:
    """Whether the channels are the last axis of a frame, or the first."""
    if channels != "auto":
        return channels == "last"
    first, middle, last = frame
    if first < min(middle, last):
        return False
    if last < min(first, middle) or (space.dtype == np.bool_ and first == middle == last):
        return True
    raise ValueError(
        f"observation_space of shape {space.shape}: neither the first nor the last axis of a frame is shorter than "
        "both others; say which one the channels are with model.network.channels=first or last"
    )
