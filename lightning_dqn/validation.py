"""Checks of constructor arguments, made before the first env step."""

from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch

from lightning_dqn.distributed.sync import processes_started
from lightning_dqn.replay import Sampler, SamplerCallable, UniformSampler
from lightning_dqn.storage.memory_size import MemorySize

MemoryDevice = Literal["auto", "cpu", "cuda"]
AT_LEAST_ONE = (
    "num_envs",
    "steps_per_iteration",
    "updates_per_iteration",
    "batch_size",
    "n_step",
    "frame_stack",
    "epoch_env_steps",
    "eval_episodes",
    "eval_max_steps",
)


def check_arguments(data: Any) -> None:
    """Check the arguments that need no environment.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name in AT_LEAST_ONE:
        if getattr(data, name) < 1:
            raise ValueError(f"{name}={getattr(data, name)}: must be at least 1")
    if data.iterations_per_chunk is not None and data.iterations_per_chunk < 1:
        raise ValueError(f"iterations_per_chunk={data.iterations_per_chunk}: must be at least 1, or None")
    if data.warmup_env_steps < 0:
        raise ValueError(f"warmup_env_steps={data.warmup_env_steps}: must be 0 or more")
    if not 0 <= data.gamma <= 1:
        raise ValueError(f"gamma={data.gamma}: must be in [0, 1]")
    least = max(data.batch_size, data.num_envs)
    if data.memory_capacity < least:
        raise ValueError(
            f"memory_capacity={data.memory_capacity}: must hold a batch and a step of every environment, "
            f"at least {least}; raise it or lower batch_size={data.batch_size} and num_envs={data.num_envs}"
        )
    steps_by_itself = data.vectorization in ("async", "vector_entry_point")
    steps_by_itself |= data.vectorization == "auto" and data.env_settings.is_atari
    if data.overlap and not steps_by_itself:
        raise ValueError(
            f"overlap=True: environments of vectorization={data.vectorization} don't step asynchronously; use "
            "async, or auto for an Atari game"
        )
    if data.memory_device not in get_args(MemoryDevice):
        raise ValueError(f"memory_device={data.memory_device}: must be one of {', '.join(get_args(MemoryDevice))}")
    if data.memory_folder is not None and data.memory_device == "cuda":
        raise ValueError(f"memory_device=cuda, memory_folder={data.memory_folder}: use only one of them")


def check_learner(data: Any, *, on_policy: bool, munchausen: bool) -> None:
    """Check the arguments against the module that is trained.

    Args:
        data: the data module.
        on_policy: whether it learns from rollouts.
        munchausen: whether it adds to each reward.

    Raises:
        ValueError: naming the argument and its value.
    """
    rows, sampler = data.num_envs * data.steps_per_iteration, type(data.probe_sampler)
    if on_policy and sampler is not UniformSampler:
        raise ValueError(f"sampler={sampler.__name__}: on-policy models have no replay memory; leave it out")
    if on_policy and data.n_step > 1:
        raise ValueError(f"n_step={data.n_step}: returns of on-policy models depend on td_lambda; use 1")
    if munchausen and data.n_step > 1:
        raise ValueError(
            f"n_step={data.n_step}: munchausen adds to the reward of every step, n-step returns only to the "
            "first one; use 1"
        )
    if on_policy and data.overlap:
        raise ValueError("overlap=True: on-policy models need rollouts of their current policy; leave it out")
    if on_policy and data.batch_size > rows:
        raise ValueError(
            f"batch_size={data.batch_size}: a rollout has num_envs={data.num_envs} x "
            f"steps_per_iteration={data.steps_per_iteration} = {rows} steps; lower it or raise one of them"
        )


def check_shard(data: Any) -> None:
    """Check that each rank's shard of the memory is large enough.

    Raises:
        ValueError: naming the argument and its value.
    """
    least, share = max(data.batch_size, data.num_envs), data.sync.shard_size(data.memory_capacity)
    if share < least:
        raise ValueError(
            f"memory_capacity={data.memory_capacity}: each of {data.sync.world_size} ranks has {share} of it, "
            f"and needs {least} for a batch and a step of every environment; raise it"
        )


def check_masks(env: gym.Env[Any, Any]) -> int:
    """Check that an environment gives action masks, and return the number of actions.

    Raises:
        ValueError: if it does not, or of another number of actions.
    """
    _, info = env.reset(seed=0)
    num_actions = int(getattr(env.action_space, "n", 0))
    shape = np.asarray(info.get("action_mask")).shape
    if shape != (num_actions,):
        raise ValueError(
            f'action_masks=True: reset() gives info["action_mask"] of shape {shape}, {(num_actions,)} is needed; '
            "wrap the environment, or leave it out"
        )
    return num_actions


def check_memory(data: Any) -> None:
    """Check that the memory fits, as far as its place is known without a trainer.

    Raises:
        ValueError: naming what it needs and what there is, or that there is no such place.
    """
    if data.memory_device == "cuda" and not torch.cuda.is_available():
        raise ValueError("memory_device=cuda: torch finds no such device; use auto or cpu")
    if processes_started()[1] > 1:
        # the shards, perhaps on several machines, are known when the run begins
        return
    if data.memory_device == "auto" and torch.cuda.is_available() and not data.memory_folder:
        return
    memory_size(data, *replay_location(data)).check()


def replay_location(data: Any) -> tuple[torch.device | None, Path | None]:
    """Return the device or the folder of stored observations; (None, None) for RAM.

    Raises:
        ValueError: if `memory_device` is cuda and the trainer uses no GPU.
    """
    if data.memory_folder is not None:
        return None, Path(data.memory_folder)
    # known when the run begins
    learner = data.trainer.strategy.root_device if data.trainer is not None else None
    if data.memory_device == "cuda":
        if learner is not None and learner.type != "cuda":
            raise ValueError(f"memory_device=cuda: the trainer learns on {learner}; use auto, or another accelerator")
        return learner or torch.device("cuda"), None
    on_cuda = learner is not None and learner.type == "cuda"
    if data.memory_device == "auto" and on_cuda and data.observation_space.dtype == np.uint8:
        try:
            memory_size(data, learner, None).check()
        except ValueError:
            return None, None
        return learner, None
    return None, None


def memory_size(data: Any, device: torch.device | None, folder: Path | None) -> MemorySize:
    """Return the size of the memory: of one rank's shard on a device, else of all shards on this machine."""
    on_device = device is not None and device.type != "cpu"
    ranks_here = 1 if data.trainer is None or on_device else data.trainer.num_devices
    capacity = (
        data.memory_capacity
        if not data.sync.is_distributed
        else data.sync.shard_size(data.memory_capacity) * ranks_here
    )
    return MemorySize(
        capacity,
        data.observation_space,
        data.extra_bytes_per_row,
        frame_stack=data.frame_stack,
        device=device,
        folder=folder,
    )


def probe_sampler(make: SamplerCallable) -> Sampler:
    """Create a sampler for inspection, so that a wrong factory is rejected before the run.

    Args:
        make: as a memory will call it.

    Raises:
        TypeError: if what is made is no sampler.
        ValueError: if an argument is out of its range.
    """
    try:
        sampler: Any = make(1, 0)
    except TypeError as error:
        raise TypeError(f"sampler={make!r}: can't be called with a capacity and a seed ({error})") from error
    if not isinstance(sampler, Sampler):
        raise TypeError(
            f"sampler={make!r}: makes a {type(sampler).__name__}, which is no Sampler; "
            "use lightning_dqn.UniformSampler or PrioritizedSampler, or subclass lightning_dqn.replay.Sampler"
        )
    return sampler


def check_positive(**arguments: float | None) -> None:
    """Check that numbers are positive, or None.

    Args:
        arguments: by name.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in arguments.items():
        # also false for NaN
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: must be positive")
