"""Deep Q-learning for people who train agents with PyTorch Lightning."""

from lightning_dqn.callbacks import EpsilonDecay as EpsilonDecay
from lightning_dqn.callbacks import SoftTargetUpdate as SoftTargetUpdate
from lightning_dqn.data import DQNDataModule as DQNDataModule
from lightning_dqn.module import DQN as DQN
from lightning_dqn.networks import MLP as MLP

__version__ = "0.1.0"
