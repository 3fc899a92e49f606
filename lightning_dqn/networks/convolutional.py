"""Networks that see: convolutions, whose flattened output is the features, and an `MLP` on it as the head.

The three are the ones by which results on Atari and MinAtar are reported. Legend: B batch, A actions, Z atoms or
quantiles, F features.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from gymnasium import spaces
from torch import Tensor, nn

from lightning_dqn.networks.images import ChannelNorm, Channels, ConvEncoder, ImageEncoder
from lightning_dqn.networks.mlp import MLP
from lightning_dqn.resume.arguments import record_arguments

# filters, kernel and stride of each convolution
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
MINATAR = ((16, 3, 1),)
# channels of each stack of residual blocks
IMPALA = (16, 32, 32)


@record_arguments
class NatureCNN(nn.Module):
    """The network of deep Q-learning on Atari: three convolutions and a hidden layer (Mnih et al. 2015, Methods).

    Made for stacks of 4 grey frames of 84 x 84 pixels; 36 x 36 is the least. Which shapes are taken, and what becomes
    of their values, says `networks.images.ImageEncoder`.

    Args:
        observation_space: a Box of images.
        outputs: what a row gives, A values, or (A, Z) where each action has Z atoms or quantiles.
        hidden_sizes: units of each hidden layer behind the convolutions; an empty list for none.
        dueling: whether state value and advantages are told apart, with a last hidden layer each (Wang et al. 2016).
        noisy: whether noise in the layers behind the convolutions explores in place of epsilon (Fortunato et al. 2018).
        layer_norm: whether each convolution, over the channels of a pixel, and hidden layer is normalised before ReLU.
        channels: which axis of a frame they are, first or last; auto takes the one shorter than both others.

    Raises:
        TypeError: if the space is no Box of images.
        ValueError: if the frames are too small, their channels can't be told, or a hidden size is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space[object],
        outputs: int | tuple[int, int],
        *,
        hidden_sizes: Sequence[int] = (512,),
        dueling: bool = False,
        noisy: bool = False,
        layer_norm: bool = False,
        channels: Channels = "auto",
    ) -> None:
        super().__init__()
        image = ImageEncoder(observation_space, channels=channels)
        image.require(_min_size(NATURE), "NatureCNN")
        self.features = ConvEncoder(image, _conv_layers(image.num_channels, NATURE, layer_norm))
        self.num_features = self.features.num_features
        switches = {"dueling": dueling, "noisy": noisy, "layer_norm": layer_norm}
        self.head = MLP(_rows(self.num_features), outputs, hidden_sizes=hidden_sizes, **switches)

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values, or (B, A, Z)."""
        return self.head(self.features(observation))  # type: ignore[no-any-return]


@record_arguments
class MinAtarCNN(nn.Module):
    """One convolution and a hidden layer, for images of few pixels (Young & Tian 2019).

    Made for MinAtar's 10 x 10 pixels; 3 x 3 is the least. Which shapes are taken, and what becomes of their values,
    says `networks.images.ImageEncoder`.

    Args:
        observation_space: a Box of images.
        outputs: what a row gives, A values, or (A, Z) where each action has Z atoms or quantiles.
        hidden_sizes: units of each hidden layer behind the convolution; an empty list for none.
        dueling: whether state value and advantages are told apart, with a last hidden layer each (Wang et al. 2016).
        noisy: whether noise in the layers behind the convolution explores in place of epsilon (Fortunato et al. 2018).
        layer_norm: whether the convolution, over the channels of a pixel, and hidden layer is normalised before ReLU.
        channels: which axis of a frame they are, first or last; auto takes the one shorter than both others.

    Raises:
        TypeError: if the space is no Box of images.
        ValueError: if the frames are too small, their channels can't be told, or a hidden size is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space[object],
        outputs: int | tuple[int, int],
        *,
        hidden_sizes: Sequence[int] = (128,),
        dueling: bool = False,
        noisy: bool = False,
        layer_norm: bool = False,
        channels: Channels = "auto",
    ) -> None:
        super().__init__()
        image = ImageEncoder(observation_space, channels=channels)
        image.require(_min_size(MINATAR), "MinAtarCNN")
        self.features = ConvEncoder(image, _conv_layers(image.num_channels, MINATAR, layer_norm))
        self.num_features = self.features.num_features
        switches = {"dueling": dueling, "noisy": noisy, "layer_norm": layer_norm}
        self.head = MLP(_rows(self.num_features), outputs, hidden_sizes=hidden_sizes, **switches)

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values, or (B, A, Z)."""
        return self.head(self.features(observation))  # type: ignore[no-any-return]


@record_arguments
class ImpalaCNN(nn.Module):
    """Three stacks of residual blocks, each at half the size, and a hidden layer (Espeholt et al. 2018, figure 3).

    The paper's large network without its recurrent layer. Takes frames of any size. Which shapes are taken, and what
    becomes of their values, says `networks.images.ImageEncoder`.

    Args:
        observation_space: a Box of images.
        outputs: what a row gives, A values, or (A, Z) where each action has Z atoms or quantiles.
        hidden_sizes: units of each hidden layer behind the convolutions; an empty list for none.
        dueling: whether state value and advantages are told apart, with a last hidden layer each (Wang et al. 2016).
        noisy: whether noise in the layers behind the convolutions explores in place of epsilon (Fortunato et al. 2018).
        layer_norm: whether each convolution, over the channels of a pixel, and hidden layer is normalised.
        channels: which axis of a frame they are, first or last; auto takes the one shorter than both others.
        width: multiplies the 16, 32 and 32 channels of the stacks.

    Raises:
        TypeError: if the space is no Box of images.
        ValueError: if the channels of the frames can't be told, or width or a hidden size is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space[object],
        outputs: int | tuple[int, int],
        *,
        hidden_sizes: Sequence[int] = (256,),
        dueling: bool = False,
        noisy: bool = False,
        layer_norm: bool = False,
        channels: Channels = "auto",
        width: int = 1,
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width={width}: every stack needs at least 1 times its channels")
        image = ImageEncoder(observation_space, channels=channels)
        sizes = [image.num_channels, *(width * size for size in IMPALA)]
        stacks = [_stack(inputs, size, layer_norm) for inputs, size in itertools.pairwise(sizes)]
        self.features = ConvEncoder(image, [*stacks, nn.ReLU()])
        self.num_features = self.features.num_features
        switches = {"dueling": dueling, "noisy": noisy, "layer_norm": layer_norm}
        self.head = MLP(_rows(self.num_features), outputs, hidden_sizes=hidden_sizes, **switches)

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values, or (B, A, Z)."""
        return self.head(self.features(observation))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Adds what layers make of their input to it (He et al. 2016).

    Args:
        layers: that leave the shape as it is.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return input + self.layers(input)  # type: ignore[no-any-return]


def _rows(num_features: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (num_features,))


def _min_size(convolutions: Sequence[tuple[int, int, int]]) -> int:
    """Pixels that leave one at the end."""
    # from a size n behind a convolution to (n - 1) stride + kernel before it
    return functools.reduce(lambda n, layer: (n - 1) * layer[2] + layer[1], reversed(convolutions), 1)


def _normed(convolution: nn.Conv2d, layer_norm: bool) -> list[nn.Module]:
    return [convolution, *[ChannelNorm(convolution.out_channels)] * layer_norm]


def _conv_layers(inputs: int, convolutions: Sequence[tuple[int, int, int]], layer_norm: bool) -> list[nn.Module]:
    """Convolutions without padding, with what stands behind them."""
    layers: list[nn.Module] = []
    for filters, kernel, stride in convolutions:
        layers += [*_normed(nn.Conv2d(inputs, filters, kernel, stride), layer_norm), nn.ReLU()]
        inputs = filters
    return layers


def _stack(inputs: int, size: int, layer_norm: bool) -> nn.Module:
    """A convolution, half the height and width, and two residual blocks of two convolutions."""
    blocks = [
        Residual([*(layer for _ in range(2) for layer in (nn.ReLU(), *_same(size, size, layer_norm)))])
        for _ in range(2)
    ]
    return nn.Sequential(*_same(inputs, size, layer_norm), nn.MaxPool2d(3, 2, padding=1), *blocks)


def _same(inputs: int, size: int, layer_norm: bool) -> list[nn.Module]:
    """A convolution that leaves height and width as they are."""
    return _normed(nn.Conv2d(inputs, size, 3, padding=1), layer_norm)
