"""The data side: plays environments and hands out what was learnt from them.

Read `player` (play), `replay_dataset` or `rollout_dataset` (training), `episode_dataset` (evaluation), `datamodule`
(all of them, for Lightning).
"""

from lightning_dqn.collector import EpisodeHistory as EpisodeHistory
from lightning_dqn.collector import Policy as Policy
from lightning_dqn.data.datamodule import DQNDataModule as DQNDataModule
from lightning_dqn.data.episode_dataset import Episode as Episode
from lightning_dqn.data.episode_dataset import EpisodeDataset as EpisodeDataset
from lightning_dqn.data.replay_dataset import ReplayDataset as ReplayDataset
from lightning_dqn.envs.errors import BrokenEnvironmentError as BrokenEnvironmentError
from lightning_dqn.variants.rollouts import Rollout as Rollout
from lightning_dqn.variants.rollouts import RolloutDataset as RolloutDataset
