"""Learners of the whole distribution of the return, each a `DQN` with a loss and a head of its own.

What `module.DQN` says of acting, updates and checkpoints holds for them.
"""

from lightning_dqn.distributional.categorical import C51 as C51
from lightning_dqn.distributional.quantile import IQN as IQN
from lightning_dqn.distributional.quantile import QRDQN as QRDQN
