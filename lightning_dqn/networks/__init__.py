"""Networks from an observation to one value, or one distribution, an action: what `module.DQN` holds twice.

Read `mlp`, and `encoder` and `noisy` that it stands on; then `convolutional`, whose networks see, and `images` that
they begin with; `quantiles` makes any network an implicit one. `normalizer` comes before any of them.
"""

from lightning_dqn.networks.convolutional import ImpalaCNN as ImpalaCNN
from lightning_dqn.networks.convolutional import MinAtarCNN as MinAtarCNN
from lightning_dqn.networks.convolutional import NatureCNN as NatureCNN
from lightning_dqn.networks.encoder import ObservationEncoder as ObservationEncoder
from lightning_dqn.networks.images import ImageEncoder as ImageEncoder
from lightning_dqn.networks.mlp import MLP as MLP
from lightning_dqn.networks.noisy import NoisyLinear as NoisyLinear
from lightning_dqn.networks.normalizer import ObservationNormalizer as ObservationNormalizer
from lightning_dqn.networks.quantiles import ImplicitQuantiles as ImplicitQuantiles
