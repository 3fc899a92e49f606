"""The data side: plays environments and hands out what was learnt from them.

Read `player` (play), `replay_dataset` or `rollout_dataset` (training), `episode_dataset` (evaluation), `datamodule`
(all of them, for Lightning).
"""

from lightning_dqn.data.datamodule import DQNDataModule as DQNDataModule
from lightning_dqn.data.episode_dataset import Episode as Episode
from lightning_dqn.data.episode_dataset import EpisodeDataset as EpisodeDataset
from lightning_dqn.data.faults import BrokenEnvironmentError as BrokenEnvironmentError
from lightning_dqn.data.player import EpisodeHistory as EpisodeHistory
from lightning_dqn.data.player import Policy as Policy
from lightning_dqn.data.replay_dataset import ReplayDataset as ReplayDataset
from lightning_dqn.data.rollout_dataset import Rollout as Rollout
from lightning_dqn.data.rollout_dataset import RolloutDataset as RolloutDataset
