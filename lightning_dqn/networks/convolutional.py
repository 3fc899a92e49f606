"""Convolutional networks for images, with an `MLP` as the head.

NatureCNN, MinAtarCNN and ImpalaCNN are the networks of published results on Atari and MinAtar. Legend: B batch, C
channels, H and W height and width in pixels, A actions, Z atoms or quantiles, F features.
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

# filters, kernel size and stride of each convolution
ConvLayers = Sequence[tuple[int, int, int]]
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
MINATAR = ((16, 3, 1),)
IMPALA_CHANNELS = (16, 32, 32)


@record_arguments
class ConvNet(nn.Module):
    """Convolutions without padding, each followed by ReLU, and an `MLP` head.

    See `networks.images.ImageEncoder` for the supported shapes and the scaling of the values.

    Args:
        observation_space: a Box of images.
        outputs: A action values, or (A, Z) values with Z atoms or quantiles per action.
        layers: (filters, kernel size, stride) of each convolution.
        hidden_sizes: units of each hidden layer after the convolutions; an empty list for none.
        dueling: whether to use separate streams for state value and advantages, each with its own last hidden layer
            (Wang et al. 2016).
        noisy: whether the layers after the convolutions are noisy, which replaces epsilon (Fortunato et al. 2018).
        layer_norm: whether to apply layer norm after each hidden layer and, over the channels of a pixel, after each
            convolution.
        channels: the channel axis of a frame, first or last; auto takes the first or last axis if it is shorter than
            the other two.

    Raises:
        TypeError: if the space is not a Box of images.
        ValueError: if the frames are too small, the channel axis is ambiguous, or a hidden size is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space[object],
        outputs: int | tuple[int, int],
        layers: ConvLayers = NATURE,
        *,
        hidden_sizes: Sequence[int] = (512,),
        dueling: bool = False,
        noisy: bool = False,
        layer_norm: bool = False,
        channels: Channels = "auto",
    ) -> None:
        super().__init__()
        image = ImageEncoder(observation_space, channels=channels)
        self.features = ConvEncoder(image, self._make_layers(image, layers, layer_norm))
        self.num_features = self.features.num_features
        rows = spaces.Box(-np.inf, np.inf, (self.num_features,))
        self.head = MLP(rows, outputs, hidden_sizes=hidden_sizes, dueling=dueling, noisy=noisy, layer_norm=layer_norm)

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values, or (B, A, Z)."""
        return self.head(self.features(observation))  # type: ignore[no-any-return]

    def _make_layers(self, image: ImageEncoder, layers: ConvLayers, layer_norm: bool) -> list[nn.Module]:
        # n pixels after a convolution need (n - 1) stride + kernel pixels before it
        smallest = functools.reduce(lambda n, layer: (n - 1) * layer[2] + layer[1], reversed(layers), 1)
        image.check_size(smallest, type(self).__name__)
        modules: list[nn.Module] = []
        in_channels = image.num_channels
        for filters, kernel, stride in layers:
            modules += [*_normed(nn.Conv2d(in_channels, filters, kernel, stride), layer_norm), nn.ReLU()]
            in_channels = filters
        return modules


class NatureCNN(ConvNet):
    """The network of deep Q-learning on Atari: three convolutions and a hidden layer (Mnih et al. 2015, Methods).

    Designed for stacks of 4 gray frames of 84 x 84 pixels; frames need at least 36 x 36. See `ConvNet` for the
    arguments.
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
        options = {"dueling": dueling, "noisy": noisy, "layer_norm": layer_norm}
        super().__init__(observation_space, outputs, NATURE, hidden_sizes=hidden_sizes, channels=channels, **options)


class MinAtarCNN(ConvNet):
    """One convolution and a hidden layer, for small images (Young & Tian 2019).

    Designed for MinAtar's 10 x 10 pixels; frames need at least 3 x 3. See `ConvNet` for the arguments.
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
        options = {"dueling": dueling, "noisy": noisy, "layer_norm": layer_norm}
        super().__init__(observation_space, outputs, MINATAR, hidden_sizes=hidden_sizes, channels=channels, **options)


class ImpalaCNN(ConvNet):
    """Three stacks of residual blocks, each at half the size, and a hidden layer (Espeholt et al. 2018, figure 3).

    The paper's large network without its recurrent layer, for frames of any size. See `ConvNet` for the arguments that
    are not listed here.

    Args:
        width: multiplies the 16, 32 and 32 channels of the stacks.

    Raises:
        TypeError: if the space is not a Box of images.
        ValueError: if the channel axis is ambiguous, or width or a hidden size is not positive.
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
        if width <= 0:
            raise ValueError(f"width={width}: must be at least 1")
        layers = [(width * size, 3, 1) for size in IMPALA_CHANNELS]
        options = {"dueling": dueling, "noisy": noisy, "layer_norm": layer_norm}
        super().__init__(observation_space, outputs, layers, hidden_sizes=hidden_sizes, channels=channels, **options)

    def _make_layers(self, image: ImageEncoder, layers: ConvLayers, layer_norm: bool) -> list[nn.Module]:
        sizes = [image.num_channels, *(filters for filters, _, _ in layers)]
        return [*(_stack(inputs, size, layer_norm) for inputs, size in itertools.pairwise(sizes)), nn.ReLU()]


class Residual(nn.Module):
    """Adds the output of some layers to their input (He et al. 2016).

    Args:
        layers: layers that keep the shape of their input.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return input + self.layers(input)  # type: ignore[no-any-return]


def _normed(convolution: nn.Conv2d, layer_norm: bool) -> list[nn.Module]:
    return [convolution, *[ChannelNorm(convolution.out_channels)] * layer_norm]


def _stack(inputs: int, size: int, layer_norm: bool) -> nn.Module:
    """A convolution, max pooling to half the height and width, and two residual blocks of two convolutions."""
    # the order of creation decides the initial weights for a seed: the blocks come first
    pairs = [[nn.ReLU(), *_normed(nn.Conv2d(size, size, 3, padding=1), layer_norm)] for _ in range(4)]
    blocks = [Residual([*pairs[i], *pairs[i + 1]]) for i in (0, 2)]
    first = _normed(nn.Conv2d(inputs, size, 3, padding=1), layer_norm)
    return nn.Sequential(*first, nn.MaxPool2d(3, 2, padding=1), *blocks)
