"""Small fits that can be stopped and resumed, and what two of them have in common to the bit."""

import os
from pathlib import Path

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_dqn import DQN, MLP, DQNDataModule, EpsilonDecay, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.envs import EnvSettings, make_vector_env
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.env_state import Reached, restore_env_state

# 300 iterations an epoch of one environment; the memory of 250 is full in the first
SMALL = {"epoch_env_steps": 300, "eval_episodes": 2, "warmup_env_steps": 50, "batch_size": 16, "memory_capacity": 250}


def small_mlp(observation_space, num_actions):
    """A quick network."""
    return MLP(observation_space, num_actions, hidden_sizes=[16, 16])


class Dropout(nn.Module):
    """A network that draws from torch's generator whenever it acts or learns."""

    def __init__(self, observation_space, num_actions):
        super().__init__()
        width = int(np.prod(observation_space.shape))
        layers = nn.Linear(width, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, num_actions)
        self.layers = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, observation):
        return self.layers(observation)


def make_pair(*, network=small_mlp, compile=False, lr=1e-3, model=DQN, learner=(), data=DQNDataModule, **options):
    """A learner, with the options `learner`, and its data side."""
    data = data(**{**SMALL, **options})

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=lr, amsgrad=True)

    spaces = data.observation_space, data.action_space
    return model(*spaces, network=network, optimizer=adam, compile=compile, **dict(learner)), data


def fit(
    folder, *, ckpt_path=None, seed=3, limits=None, callbacks=(), every_n_updates=111, target=(), show=False, **options
):
    """A fit with a checkpoint at every epoch's end, and one every so many updates; its trainer."""
    pl.seed_everything(seed, verbose=False)
    # a resumed run draws from the generators of its checkpoint, whatever this process drew before
    os.environ["PL_GLOBAL_SEED"] = "3"
    epochs = ModelCheckpoint(folder, "epoch{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    updates = ModelCheckpoint(
        folder, "mid{step}", save_top_k=-1, every_n_train_steps=every_n_updates, auto_insert_metric_name=False
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            SoftTargetUpdate(**dict(target)),
            EpsilonDecay(),
            PriorityUpdate(anneal_env_steps=900),
            *callbacks,
            epochs,
            updates,
        ],
        enable_progress_bar=show,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"logger": False, **(limits or {"max_epochs": 2})},
    )
    model, data = make_pair(**options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def differences(one, other, path=""):
    """Key paths at which two checkpoints are not the same to the bit.

    But for where files are stored, and for what identifies the run, which a resume compares by itself.
    """
    if path in (".callbacks", ".options", ".manifest", ".agent"):
        return
    if type(one) is not type(other):
        yield path
    elif isinstance(one, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name), other.get(name), f"{path}.{name}")
    elif isinstance(one, (list, tuple)):
        for i in range(max(len(one), len(other))):
            yield from differences(one[i : i + 1] and one[i], other[i : i + 1] and other[i], f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if not same or one.contiguous().numpy().tobytes() != other.contiguous().numpy().tobytes():
            yield path
    elif one != other:
        yield path


def play(checkpoint, steps=50, wrappers=()):
    """What the environments of a checkpoint show in their next steps, as bytes."""
    data, under_way = checkpoint["agent"]["data"]["init_args"], checkpoint["DQNDataModule"]["train"]["under_way"]
    settings = EnvSettings(data["env_id"], wrappers=wrappers, frame_stack=data["frame_stack"])
    envs = make_vector_env(settings, data["num_envs"], data["vectorization"])
    where = under_way.get("pending", under_way)
    ended = where["terminated"] | where["truncated"] if "pending" in under_way else under_way["resetting"]
    returns, lengths = under_way["returns"].clone(), under_way["lengths"].clone()
    if "pending" in under_way:
        returns += where["reward"]
        lengths += ~under_way["resetting"]
    reached = Reached(where["observation"].numpy(), *(part.numpy() for part in (returns, lengths, ended)))
    assert not restore_env_state(envs, under_way["envs"], "envs", reached).any()
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(steps):
        action = rng.integers(envs.single_action_space.n, size=envs.num_envs)
        shown += [part.tobytes() for part in envs.step(action)[:4]]
    envs.close()
    return shown


def load(path):
    """A checkpoint, read as a fit reads it."""
    return AtomicCheckpointIO().load_checkpoint(path)


def assert_same_run(one: Path, other: Path, wrappers=()):
    """Two checkpoints are the same to the bit, in all that the next iterations depend on."""
    one, other = load(one), load(other)
    assert list(differences(one, other)) == []
    assert play(one, wrappers=wrappers) == play(other, wrappers=wrappers)
    # neither of a run that did nothing
    assert one["global_step"] > 50
    assert len(one["DQNDataModule"]["train"]["episodes"]["returns"]) > 0


class Unrepeatable(gym.Wrapper):
    """Its observations depend on how many steps the process has made, which no seed brings back."""

    steps = 0

    def step(self, action):
        Unrepeatable.steps += 1
        observation, *outcome = self.env.step(action)
        return observation + np.float32(1e-3 * Unrepeatable.steps), *outcome
