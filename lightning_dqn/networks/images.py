"""Encoders of images: from stored observations to (B, C, H, W) floats, and through convolutions to features.

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
    """Converts stored images to (B, C, H, W) floats on the device of the network, so transfers stay small.

    uint8 boxes with an upper bound of 255 are divided by 255. All other values are only cast to float.

    The shape of the box gives the axes:

    - (H, W) is one gray frame.
    - Of three axes the channels are the first or the last, whichever is shorter than the other two: stacked gray frames
      and (C, H, W), or (H, W, C). A cube of bools has its channels last, such as MinAtar's Seaquest.
    - Of four axes the first is the stack of k frames, and the rest are as above. (k, H, W, C) becomes k * C channels,
      frame by frame.

    Has no parameters.

    Args:
        space: a `Box` of images.
        channels: the channel axis of a frame: first, last, or auto to infer it from the shape.

    Raises:
        TypeError: if the space is not a Box of images.
        ValueError: if channels is auto and the shape is ambiguous.
    """

    def __init__(self, space: spaces.Space[object], *, channels: Channels = "auto") -> None:
        super().__init__()
        if not isinstance(space, spaces.Box) or len(space.shape) not in {2, 3, 4}:
            raise TypeError(
                f"observation_space {space}: convolutions need a Box of 2 axes (one gray frame), 3 (with frames or "
                "channels) or 4 (stacked color frames); use MLP for other observations"
            )
        self.shape = space.shape
        self.scaled = space.dtype == np.uint8 and int(space.high.max()) == 255
        # shape of one frame, with the channel that (H, W) leaves out
        frame = space.shape[-3:] if len(space.shape) > 2 else (1, *space.shape)
        self.channels_last = len(space.shape) > 2 and _channels_are_last(space, frame, channels)
        height, width, num_channels = frame if self.channels_last else (*frame[1:], frame[0])
        self.size = height, width
        self.num_channels = num_channels * math.prod(space.shape[:-3])

    def forward(self, observation: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, ...) observations to (B, C, H, W) floats of a dtype, in the channels_last memory format."""
        images = observation.movedim(-1, -3) if self.channels_last else observation
        images = images.reshape(len(observation), self.num_channels, *self.size)
        # before the cast, since bytes are cheaper to reorder; the format makes an update of NatureCNN 20% faster on a
        # CPU and is preferred by tensor cores
        images = images.contiguous(memory_format=torch.channels_last).to(dtype)
        return images / 255 if self.scaled else images

    def check_size(self, smallest: int, owner: str) -> None:
        """Check that frames are large enough for the convolutions.

        Args:
            smallest: least height and width in pixels.
            owner: class name of the network.

        Raises:
            ValueError: if a frame is smaller.
        """
        if min(self.size) < smallest:
            others = "" if owner == "MinAtarCNN" else "use MinAtarCNN or ImpalaCNN, or "
            raise ValueError(
                f"observation_space of shape {self.shape} has frames of {self.size[0]} x {self.size[1]} pixels, and "
                f"{owner} needs {smallest} x {smallest} at least: {others}enlarge them with "
                "gymnasium.wrappers.ResizeObservation"
            )


class ConvEncoder(nn.Module):
    """Encodes stored images by an `ImageEncoder` and convolutions.

    Args:
        image: encoder of the images.
        layers: layers from (B, C, H, W) to (B, C', H', W').
    """

    def __init__(self, image: ImageEncoder, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.image, self.layers = image, nn.Sequential(*layers)
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, *image.shape)).shape[1]

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, F), flattened from (B, C', H', W')."""
        dtype = next(self.layers.parameters()).dtype
        features: Tensor = self.layers(self.image(observation, dtype))
        return features.flatten(1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel (Ba et al. 2016), which PQN uses after convolutions."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _channels_are_last(space: spaces.Box, frame: tuple[int, ...], channels: Channels) -> bool:
    """Whether the channels are the last axis of a frame."""
    if channels != "auto":
        return channels == "last"
    first, middle, last = frame
    if first < min(middle, last):
        return False
    if last < min(first, middle) or (space.dtype == np.bool_ and first == middle == last):
        return True
    raise ValueError(
        f"observation_space of shape {space.shape}: neither the first nor the last axis of a frame is shorter than "
        "the other two; give the channel axis by channels=first or last"
    )
