"""Deep Q-learning for people who train agents with PyTorch Lightning."""

import gc

# the collector would look again and again for garbage in what torch and Lightning make at their import, where there is
# none: a fifth of the time that importing takes
_collects = gc.isenabled()
gc.disable()
try:
    from lightning_dqn.agent import Agent as Agent
    from lightning_dqn.agent import load_agent as load_agent
    from lightning_dqn.callbacks import EpsilonDecay as EpsilonDecay
    from lightning_dqn.callbacks import PriorityUpdate as PriorityUpdate
    from lightning_dqn.callbacks import SoftTargetUpdate as SoftTargetUpdate
    from lightning_dqn.data import DQNDataModule as DQNDataModule
    from lightning_dqn.distributional import C51 as C51
    from lightning_dqn.distributional import IQN as IQN
    from lightning_dqn.distributional import QRDQN as QRDQN
    from lightning_dqn.module import DQN as DQN
    from lightning_dqn.networks import MLP as MLP
    from lightning_dqn.networks import ImpalaCNN as ImpalaCNN
    from lightning_dqn.networks import MinAtarCNN as MinAtarCNN
    from lightning_dqn.networks import NatureCNN as NatureCNN
    from lightning_dqn.pqn import PQN as PQN
    from lightning_dqn.replay import PrioritizedSampler as PrioritizedSampler
    from lightning_dqn.replay import UniformSampler as UniformSampler
finally:
    gc.freeze()
    if _collects:
        gc.enable()

__version__ = "0.2.0"
