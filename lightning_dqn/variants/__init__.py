"""Variants of DQN, each a subclass with its own loss and head."""

from lightning_dqn.variants.c51 import C51 as C51
from lightning_dqn.variants.pqn import PQN as PQN
from lightning_dqn.variants.quantile import IQN as IQN
from lightning_dqn.variants.quantile import QRDQN as QRDQN
