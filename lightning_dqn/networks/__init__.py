"""Networks from an observation to action values, or to a distribution per action.

`mlp` builds on `encoder` and `noisy`; `convolutional` builds on `images` and has an `MLP` as its head; `quantiles`
turns a network into an implicit quantile network; `normalizer` normalizes the observations of any network.
"""

from lightning_dqn.networks.convolutional import ConvNet as ConvNet
from lightning_dqn.networks.convolutional import ImpalaCNN as ImpalaCNN
from lightning_dqn.networks.convolutional import MinAtarCNN as MinAtarCNN
from lightning_dqn.networks.convolutional import NatureCNN as NatureCNN
from lightning_dqn.networks.encoder import ObservationEncoder as ObservationEncoder
from lightning_dqn.networks.images import ImageEncoder as ImageEncoder
from lightning_dqn.networks.mlp import MLP as MLP
from lightning_dqn.networks.noisy import NoisyLinear as NoisyLinear
from lightning_dqn.networks.normalizer import ObservationNormalizer as ObservationNormalizer
from lightning_dqn.networks.quantiles import ImplicitQuantiles as ImplicitQuantiles
