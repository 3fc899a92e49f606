"""The data side: plays environments and hands out what was learnt from them.

Read `replay_dataset` (training), then `episode_dataset` (evaluation), then `datamodule` (both, for Lightning).
"""

from lightning_dqn.data.datamodule import DQNDataModule as DQNDataModule
from lightning_dqn.data.episode_dataset import Episode as Episode
from lightning_dqn.data.episode_dataset import EpisodeDataset as EpisodeDataset
from lightning_dqn.data.faults import BrokenEnvironmentError as BrokenEnvironmentError
from lightning_dqn.data.player import EpisodeHistory as EpisodeHistory
from lightning_dqn.data.player import Policy as Policy
from lightning_dqn.data.replay_dataset import ReplayDataset as ReplayDataset
