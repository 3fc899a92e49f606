"""The data side of a run as a `LightningDataModule`: environments, replay memory and evaluation episodes."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn._compat.lightning import collective_timeout, ignore_pytree_deprecation
from lightning_dqn.collector import EpisodeHistory, Policy
from lightning_dqn.data import Chunk, ReplayDataset, TrainLoader, chunk_length
from lightning_dqn.distributed.sync import Sync
from lightning_dqn.envs import EnvSettings, EnvWrapper, Vectorization, make_env, make_vector_env
from lightning_dqn.evaluation import EpisodeDataset
from lightning_dqn.replay import ReplayMemory, SamplerCallable, UniformSampler
from lightning_dqn.resume.arguments import describe, describe_instance, public_path, record_arguments
from lightning_dqn.resume.content import CheckpointError, check_bool, check_dict, check_int, invalid
from lightning_dqn.resume.dataset import reshard_state, restore_dataset, warn_inexact_resume, warn_long_episodes
from lightning_dqn.resume.env_state import unsupported_reason
from lightning_dqn.resume.memory_state import check_actions
from lightning_dqn.resume.plain_form import plain_form
from lightning_dqn.resume.spaces import describe_env
from lightning_dqn.validation import (
    MemoryDevice,
    check_arguments,
    check_learner,
    check_masks,
    check_memory,
    check_shard,
    memory_size,
    probe_sampler,
    replay_location,
)


@record_arguments
class DQNDataModule(pl.LightningDataModule):
    """Environments, replay memory and evaluation episodes of a run.

    With an on-policy model (PQN) there is no memory, and its arguments are ignored.

    Args:
        env_id: Gymnasium id of an environment with discrete actions; `module:Env-v0` imports the module first.
        env_kwargs: arguments of the environment, or of `envs.atari.AtariConfig` for an Atari game; give a secret
            (token, key, ...) as {from_env: NAME}, the name of an environment variable.
        wrappers: Gymnasium wrappers of each environment, innermost first.
        frame_stack: number of stacked frames in an observation, oldest first; 1 for no stacking.
        num_envs: number of parallel environments per rank, N.
        vectorization: auto, sync, async or vector_entry_point (the environment's own vector form).
        steps_per_iteration: env steps in each environment per iteration.
        updates_per_iteration: updates per iteration, U.
        iterations_per_chunk: iterations in a chunk, which Lightning treats as one batch; null for 32 updates or steps
            per environment. A chunk has one iteration with max_steps or every_n_train_steps, which count updates.
        batch_size: transitions per update and device.
        memory_capacity: capacity of the replay memory in transitions, over all environments and ranks.
        memory_device: device of the stored observations: cpu, cuda, or auto, which stores images on the GPU of the
            model if they fit.
        memory_folder: folder of a memory-mapped file for observations; null for none.
        sampler: sampler of the memory: lightning_dqn.UniformSampler or lightning_dqn.PrioritizedSampler.
        warmup_env_steps: env steps before the first update, over all environments and ranks.
        gamma: discount factor of one env step, in [0, 1].
        n_step: number of rewards summed in n-step returns.
        epoch_env_steps: env steps per epoch, over all environments and ranks; each epoch ends with an evaluation.
        eval_episodes: greedy episodes per evaluation.
        eval_max_steps: largest length of an evaluation episode, in env steps.
        save_memory: whether checkpoints contain the memory; without it, a resumed run starts with a warm-up.
        action_masks: whether to choose only actions that info["action_mask"] of the environment allows.
        overlap: whether environments step during the updates, with actions chosen before these.

    Raises:
        ValueError: if a value is out of its range, there is no such environment, or the memory is too large.
    """

    def __init__(
        self,
        *,
        env_id: str = "CartPole-v1",
        env_kwargs: dict[str, Any] | None = None,
        wrappers: list[EnvWrapper] | None = None,
        frame_stack: int = 1,
        num_envs: int = 1,
        vectorization: Vectorization = "auto",
        steps_per_iteration: int = 1,
        updates_per_iteration: int = 1,
        iterations_per_chunk: int | None = None,
        batch_size: int = 128,
        memory_capacity: int = 10_000,
        memory_device: MemoryDevice = "auto",
        memory_folder: str | None = None,
        sampler: SamplerCallable = UniformSampler,
        warmup_env_steps: int = 128,
        gamma: float = 0.99,
        n_step: int = 1,
        epoch_env_steps: int = 2_500,
        eval_episodes: int = 20,
        eval_max_steps: int = 27_000,
        save_memory: bool = True,
        action_masks: bool = False,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        self.all_args: dict[str, Any]
        self.env_id = env_id
        self.env_kwargs = env_kwargs or {}
        self.wrappers = wrappers or []
        self.frame_stack = frame_stack
        self.num_envs = num_envs
        self.vectorization = vectorization
        self.steps_per_iteration = steps_per_iteration
        self.updates_per_iteration = updates_per_iteration
        self.iterations_per_chunk = iterations_per_chunk
        self.batch_size = batch_size
        self.memory_capacity = memory_capacity
        self.memory_device = memory_device
        self.memory_folder = memory_folder
        self.sampler = sampler
        self.warmup_env_steps = warmup_env_steps
        self.gamma = gamma
        self.n_step = n_step
        self.epoch_env_steps = epoch_env_steps
        self.eval_episodes = eval_episodes
        self.eval_max_steps = eval_max_steps
        self.save_memory = save_memory
        self.action_masks = action_masks
        self.overlap = overlap
        self.env_settings = EnvSettings(env_id, self.env_kwargs, self.wrappers, frame_stack)
        self.sync = Sync()
        check_arguments(self)
        self.probe_sampler = probe_sampler(sampler)
        self.extra_bytes_per_row = self.probe_sampler.bytes_per_row()
        env = make_env(self.env_settings)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.render_modes: list[str] = env.metadata.get("render_modes", [])
        self.mask_size = check_masks(env) if action_masks else 0
        self._env_facts = describe_env(env)
        env.close()
        self.extra_bytes_per_row += self.mask_size
        check_memory(self)
        self._seed = 0
        # the module of the last fit and, once that has ended, where its environments were
        self._module: Any = None
        self._paused: dict[str, Any] | None = None
        self._continues = False
        # reason why checkpoints can't contain the state of the environments; None if they can
        self._inexact: str | None = None
        self._told_too_long = False
        # a `ReplayDataset`, or the `RolloutDataset` of an on-policy model
        self.train_dataset: Any = None
        self.eval_dataset: EpisodeDataset | None = None
        self.train_loader: TrainLoader | None = None
        # iteration of the epoch at which a resumed run continues
        self._iteration = 0

    @property
    def env_steps(self) -> int:
        """Env steps in training so far, summed over ranks."""
        return self.train_dataset.env_steps if self.train_dataset else 0

    @property
    def episodes(self) -> EpisodeHistory:
        """Finished training episodes of this rank."""
        return self.train_dataset.episodes if self.train_dataset else EpisodeHistory()

    def setup(self, stage: str) -> None:
        """Create environments and memory; their seeds derive from torch's initial seed on rank 0 and from the rank.

        `seed_everything` sets torch's seed. Evaluation has the same seeds on all ranks, which divide its episodes.

        Raises:
            ValueError: if the module can't use an option.
        """
        assert self.trainer is not None
        ignore_pytree_deprecation()
        learner: Any = self.trainer.lightning_module
        check_learner(self, on_policy=learner.on_policy, munchausen=learner.munchausen)
        policy: Policy = learner.policy
        timeout = collective_timeout(self.trainer.strategy)
        before, self.sync = self.sync, Sync(self.trainer.global_rank, self.trainer.world_size, timeout)
        seed = (
            torch.initial_seed()
            if not self.sync.is_distributed
            else self.trainer.strategy.broadcast(torch.initial_seed())
        )
        self._seed = int(seed)
        play_seed, sample_seed, *_ = np.random.SeedSequence([seed, self.sync.rank]).spawn(4)
        self.close()
        self._continues = stage == "fit" and self._paused is not None and self._module is learner
        self._continues &= before.world_size == self.sync.world_size
        if self._continues:
            assert self._paused is not None
            self.sync.env_steps = before.env_steps
            self.train_dataset.sync = self.sync
            envs = make_vector_env(self.env_settings, self.num_envs, self.vectorization)
            self.train_dataset.reopen(envs, self._paused)
        elif stage == "fit":
            if learner.on_policy:
                self.train_dataset = learner.make_rollouts(self, play_seed, sample_seed)
            else:
                self.train_dataset = self._make_replay(policy, play_seed, sample_seed)
            self._module = learner
            self._inexact = unsupported_reason(self.train_dataset.envs)
            # a checkpoint without the memory has no environments either
            if self._inexact is not None and (self.save_memory or learner.on_policy):
                warn_inexact_resume(self._inexact)
        self.eval_dataset = EpisodeDataset(
            self.env_settings,
            policy,
            num_episodes=self.eval_episodes,
            seed=_episode_seed(self._seed, stage),
            max_episode_steps=self.eval_max_steps,
            keep_steps=stage == "predict",
            action_masks=self.action_masks,
            sync=self.sync,
        )

    def _make_replay(
        self, policy: Policy, seed: np.random.SeedSequence, sample_seed: np.random.SeedSequence
    ) -> ReplayDataset:
        """Create environments and an empty memory, or this rank's shard of it.

        Raises:
            ValueError: if the memory has no room, or a shard is too small.
        """
        check_shard(self)
        device, folder = replay_location(self)
        size = memory_size(self, device, folder)
        size.check()
        rank_zero_info(size.describe())
        memory = ReplayMemory(
            capacity=self.sync.shard_size(self.memory_capacity),
            num_envs=self.num_envs,
            observation_space=self.observation_space,
            gamma=self.gamma,
            n_step=self.n_step,
            frame_stack=self.frame_stack,
            device=device,
            folder=folder,
            mask_size=self.mask_size,
            sampler=self.sampler,
            seed=sample_seed,
        )
        return ReplayDataset(
            envs=make_vector_env(self.env_settings, self.num_envs, self.vectorization),
            memory=memory,
            policy=policy,
            seed=seed,
            steps_per_iteration=self.steps_per_iteration,
            updates_per_iteration=self.updates_per_iteration,
            batch_size=self.batch_size,
            warmup_env_steps=self.warmup_env_steps,
            epoch_env_steps=self.epoch_env_steps,
            save_memory=self.save_memory,
            action_masks=self.action_masks,
            overlap=self.overlap,
            sync=self.sync,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move each batch of a chunk to the device when it is sampled."""
        if not isinstance(batch, Chunk):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch if device.type == "cpu" else Chunk(_move(each, device) for each in batch)

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of training iterations."""
        if self._continues:
            rank_zero_info(
                f"This fit continues the last one at {self.env_steps:,} env steps, with its memory and its episodes; "
                "only the optimizer is new. To start over, create a new DQNDataModule."
            )
        self.train_loader = loader = self._make_loader(self._iteration)
        assert self.trainer is not None
        if 0 < self._iteration < min(loader.chunk_length, len(self.train_dataset)):
            # with no complete chunk in the epoch, Lightning would count an evaluation as due
            self.trainer.fit_loop.epoch_loop.restarting = False
        self._iteration = 0
        return loader

    def _make_loader(self, iteration: int) -> TrainLoader:
        assert self.trainer is not None
        longest = max(self.updates_per_iteration, self.steps_per_iteration)
        length = chunk_length(self.trainer, self.iterations_per_chunk, longest)
        return TrainLoader(self.train_dataset, chunk_length=length, trainer=self.trainer, iteration=iteration)

    def val_dataloader(self) -> EpisodeDataset | None:
        """Greedy episodes, in this process: the policy of a worker process is never updated."""
        return self.eval_dataset

    def test_dataloader(self) -> EpisodeDataset | None:
        """Greedy episodes with other seeds than validation."""
        return self.eval_dataset

    def predict_dataloader(self) -> EpisodeDataset | None:
        """Greedy episodes with all their steps."""
        return self.eval_dataset

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training dataset, its iteration in the epoch and the seed; empty without training."""
        if self.train_dataset is None:
            return {}
        closed = self.train_dataset.envs.closed
        train = self.train_dataset.state_dict(with_envs=self._inexact is None and not closed)
        if closed and self._paused is not None and ("memory" in train or self.train_dataset.memory is None):
            # the environments as they were when the fit closed them
            train = {**train, **self._paused}
        self._told_too_long = self._told_too_long or warn_long_episodes(train, self.sync)
        iteration = 0 if self.train_loader is None else self.train_loader.iteration
        return {"save_memory": "memory" in train, "seed": self._seed, "iteration": iteration, "train": train}

    def check_checkpoint(self, checkpoint: Mapping[str, Any], *, has_memory: bool) -> None:
        """Check that a checkpoint contains the state of this data module, since Lightning ignores a missing one.

        Args:
            checkpoint: as Lightning writes it.
            has_memory: whether the module learns from a memory.

        Raises:
            CheckpointError: if the state, or its memory, is missing.
        """
        name = type(self).__qualname__
        if name not in checkpoint:
            raise CheckpointError(
                f"{name} is missing in the checkpoint, so no run can be resumed from it: use the data module that it "
                "was made with, or start a new run from its weights (`fit --init_from`, `DQN.load_from_checkpoint`)"
            )
        train = self._check_state(checkpoint[name], has_memory=has_memory)
        if "memories" in train:
            # the memories of several ranks are read from their own files
            invalid(f"{name}.train.memories", "is unknown")
        envs = check_dict(train.get("under_way", {"envs": {}}), f"{name}.train.under_way", ("envs",))["envs"]
        if type(envs) is dict and type(envs.get("seeds")) is list and len(envs["seeds"]) != self.num_envs:
            invalid(f"{name}.train.under_way.envs.seeds", f"is not of {self.num_envs} environments")

    def _check_state(self, state: Any, *, has_memory: bool) -> dict[str, Any]:
        """Check a state of this data module, and return the state of its dataset."""
        name = type(self).__qualname__
        state = check_dict(state, name, ("save_memory", "seed", "iteration", "train"))
        check_bool(state["save_memory"], f"{name}.save_memory")
        check_int(state["seed"], f"{name}.seed", 0, 2**64 - 1)
        check_int(state["iteration"], f"{name}.iteration")
        train = check_dict(state["train"], f"{name}.train")
        if has_memory and state["save_memory"] and not {"memory", "memories"} & train.keys():
            raise CheckpointError(f"{name}.train.memory is missing in the checkpoint: use another one")
        return train

    @property
    def is_prioritized(self) -> bool:
        """Whether the sampler uses priorities."""
        return self.probe_sampler.uses_priorities

    def describe(self) -> dict[str, Any]:
        """Return class, arguments and environment as plain values, for the manifest."""
        arguments = {name: describe(value) for name, value in self.all_args.items()}
        arguments["env_kwargs"] = plain_form(self.env_kwargs)
        arguments["wrappers"] = [describe(wrapper, skip=1) for wrapper in self.wrappers]
        arguments["sampler"] = describe_instance(self.sampler, self.probe_sampler, skip=2)
        return {"data": {"class_path": public_path(type(self)), "init_args": arguments}, **self._env_facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a run. Lightning calls it after `setup`.

        Raises:
            MisconfigurationException: if it was another run.
            CheckpointError: if its state can't be restored.
        """
        assert self.trainer is not None
        if self.trainer.state.fn != "fit" or self.train_dataset is None:
            return
        self._check_state(state, has_memory=self.train_dataset.memory is not None)
        # a resumed run keeps its evaluation episodes, whatever the seed of this process
        self._seed = state["seed"]
        if self.eval_dataset is not None:
            self.eval_dataset.seed = _episode_seed(self._seed, "fit")
        name = f"{type(self).__qualname__}.train"
        if "memory" in state["train"]:
            check_actions(state["train"]["memory"], self.action_space, f"{name}.memory")
        self._continues = False
        self._iteration = check_int(state["iteration"], f"{name}.iteration", high=len(self.train_dataset))
        restore_dataset(self.train_dataset, state["train"], with_envs=self._inexact is None, name=name)

    def reshard_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the state from which this rank resumes a run of another world size; see `resume.dataset`."""
        name = f"{type(self).__qualname__}.train"
        train = [check_dict(state["train"], name, ("env_steps", "episodes")) for state in states]
        for each in train:
            env_steps = check_int(each["env_steps"], f"{name}.env_steps")
            EpisodeHistory().load_state_dict(each["episodes"], f"{name}.episodes", env_steps)
        before, now = states[0]["iteration"], len(self.train_dataset)
        of_rank = self.num_envs * self.steps_per_iteration
        ended = before >= math.ceil(self.epoch_env_steps / (of_rank * len(states)))
        # the same number of env steps, in iterations of this world size
        iteration = now if ended else min(round(before * len(states) / self.sync.world_size), now - 1)
        return {**states[0], "iteration": iteration, "train": reshard_state(train, self.sync, torch.initial_seed())}

    def chunks_of_epoch(self, state: Mapping[str, Any]) -> tuple[int, bool]:
        """Return the number of complete chunks of the epoch in a state, and whether the epoch is complete.

        Args:
            state: from a checkpoint, for this rank.
        """
        loader = self._make_loader(0)
        if state["iteration"] >= len(self.train_dataset):
            return len(loader), True
        return state["iteration"] // loader.chunk_length, False

    def teardown(self, stage: str) -> None:
        """Close the environments; a later fit continues with clock, history and memory."""
        self._pause(with_envs=self._inexact is None)

    def on_exception(self, exception: BaseException) -> None:
        """Close the environments; Lightning does not call `teardown` after an exception."""
        self._pause(with_envs=False)

    def _pause(self, *, with_envs: bool) -> None:
        """Save the state of open training environments, and close all environments."""
        if self.train_dataset is not None and not self.train_dataset.envs.closed:
            self._paused = self.train_dataset.collector.state_dict(with_envs=with_envs)
        self.close()

    def close(self) -> None:
        """Close all environments that are open."""
        if self.train_dataset is not None:
            self.train_dataset.envs.close()
        if self.eval_dataset is not None:
            self.eval_dataset.close()


def _move(batch: Any, device: torch.device) -> Any:
    """A batch on a device: on a GPU the copy from pinned memory runs while the device works on the last batch."""
    if batch.reward.device == device:
        return batch
    on_gpu = device.type == "cuda"
    parts = (part.pin_memory() if on_gpu and not part.is_cuda else part for part in batch)
    return type(batch)(*(part.to(device, non_blocking=on_gpu) for part in parts))


def _episode_seed(seed: int, stage: str) -> int:
    """The seed of an evaluation's first episode; a test does not play those that chose the best checkpoint."""
    *_, validation, test = np.random.SeedSequence([seed, 0]).spawn(4)
    sequence = validation if stage in ("fit", "validate") else test
    # of 31 bits, which all environments take
    return int(sequence.generate_state(1)[0]) >> 1
