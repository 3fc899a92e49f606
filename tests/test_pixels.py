"""Learning from pixels, from the environment to the score."""

import pytest
import torch
from catch import Catch
from conftest import quiet_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, NatureCNN, SoftTargetUpdate


@pytest.mark.learning
@pytest.mark.parametrize("seed", [0, 1])
def test_catch_is_learnt_from_its_pixels(seed):
    seed_everything(seed)
    data = DQNDataModule(
        env_id=Catch.env_id,
        frame_stack=2,
        num_envs=8,
        batch_size=32,
        memory_capacity=10_000,
        warmup_env_steps=500,
        n_step=3,
        epoch_env_steps=5_000,
        eval_episodes=100,
    )
    model = DQN(
        data.observation_space,
        data.action_space,
        network=NatureCNN,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-4),
        double=True,
    )
    # the best return is 1 in every episode
    learnt = EarlyStopping("val/episode_return", mode="max", stopping_threshold=0.95, patience=100)
    schedules = [SoftTargetUpdate(tau=0.02), EpsilonDecay(start=1.0, end=0.05, decay_env_steps=3_000)]
    trainer = quiet_trainer(max_epochs=8, callbacks=[*schedules, learnt])
    trainer.fit(model, data)
    assert trainer.callback_metrics["val/episode_return"] >= 0.95
