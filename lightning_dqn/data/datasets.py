"""Makes the datasets of a data module from its options."""

from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.collector import Policy
from lightning_dqn.data.checks import check_shard, memory_size, replay_location
from lightning_dqn.data.episode_dataset import EpisodeDataset
from lightning_dqn.data.replay_dataset import ReplayDataset
from lightning_dqn.envs import make_vector_env
from lightning_dqn.replay import ReplayMemory
from lightning_dqn.variants.rollouts import RolloutDataset

if TYPE_CHECKING:
    from lightning_dqn.data.datamodule import DQNDataModule


def make_replay(
    data: "DQNDataModule", policy: Policy, seed: np.random.SeedSequence, sample_seed: np.random.SeedSequence
) -> ReplayDataset:
    """Environments and an empty memory, or this rank's shard of it; `seed` is that of play, `sample_seed` of the draws.

    Raises:
        ValueError: if the memory has no room, or a shard is too small.
    """
    check_shard(data)
    device, folder = replay_location(data)
    size = memory_size(data, device, folder)
    size.check()
    rank_zero_info(size.describe())
    memory = ReplayMemory(
        capacity=data.sync.shard_size(data.memory_capacity),
        num_envs=data.num_envs,
        observation_space=data.observation_space,
        gamma=data.gamma,
        n_step=data.n_step,
        frame_stack=data.frame_stack,
        device=device,
        folder=folder,
        mask_size=data.mask_size,
        sampler=data.sampler,
        seed=sample_seed,
    )
    return ReplayDataset(
        envs=make_vector_env(data.env_settings, data.num_envs, data.vectorization),
        memory=memory,
        policy=policy,
        seed=seed,
        steps_per_iteration=data.steps_per_iteration,
        updates_per_iteration=data.updates_per_iteration,
        batch_size=data.batch_size,
        warmup_env_steps=data.warmup_env_steps,
        epoch_env_steps=data.epoch_env_steps,
        save_memory=data.save_memory,
        action_masks=data.action_masks,
        overlap=data.overlap,
        sync=data.sync,
    )


def make_rollouts(
    data: "DQNDataModule", policy: Policy, seed: np.random.SeedSequence, sample_seed: np.random.SeedSequence
) -> RolloutDataset:
    """Environments whose steps are learnt from once; `seed` is that of play, `sample_seed` that of the minibatches."""
    return RolloutDataset(
        envs=make_vector_env(data.env_settings, data.num_envs, data.vectorization),
        policy=policy,
        gamma=data.gamma,
        seed=seed,
        sample_seed=sample_seed,
        steps_per_iteration=data.steps_per_iteration,
        updates_per_iteration=data.updates_per_iteration,
        batch_size=data.batch_size,
        epoch_env_steps=data.epoch_env_steps,
        action_masks=data.action_masks,
        sync=data.sync,
    )


def first_episode_seed(seed: np.random.SeedSequence) -> int:
    """The seed of the first evaluation episode, of 31 bits, which all environments take."""
    return int(seed.generate_state(1)[0]) >> 1


def make_evaluation(
    data: "DQNDataModule", policy: Policy, seed: np.random.SeedSequence, *, keep_steps: bool
) -> EpisodeDataset:
    """Greedy episodes, with their steps where these are asked for."""
    return EpisodeDataset(
        data.env_settings,
        policy,
        num_episodes=data.eval_episodes,
        seed=first_episode_seed(seed),
        max_episode_steps=data.eval_max_steps,
        keep_steps=keep_steps,
        action_masks=data.action_masks,
        sync=data.sync,
    )
