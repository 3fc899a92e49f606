"""Training data: env steps into the replay memory, minibatches out of it, in chunks of iterations.

`ReplayDataset` connects `collector` and `replay` with `module.DQN`; `TrainLoader` divides its iterations into chunks.
Legend: U updates, B batch, N envs.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from lightning.pytorch import Trainer
from torch.utils.data import IterableDataset, get_worker_info

from lightning_dqn._compat.lightning import counts_updates
from lightning_dqn.collector import Collector, Mask, Policy
from lightning_dqn.distributed.sync import Sync
from lightning_dqn.replay import AnyTransition, ReplayMemory
from lightning_dqn.resume.content import check_dict, check_int


class ReplayDataset(IterableDataset[AnyTransition]):
    """Steps N environments and yields minibatches from the memory; one item is one iteration.

    An iteration makes `steps_per_iteration` steps in each environment, then yields U minibatches of B transitions, or
    none (U = 0) during the warm-up. The state is stored on the object: the iterator of a new epoch continues where the
    last one stopped.

    With several ranks, each has such a dataset with its own environments and memory; env steps are summed over ranks.
    They synchronize once an iteration, before the batch is yielded, and all start to learn in the same iteration.

    Args:
        envs: vector environment with NEXT_STEP autoreset.
        memory: receives the steps.
        policy: chooses the actions.
        seed: seed of exploration and of the environments.
        steps_per_iteration: env steps in each environment per iteration.
        updates_per_iteration: minibatches in a batch, U.
        batch_size: transitions in a minibatch, B.
        warmup_env_steps: env steps before the first minibatch, over all ranks.
        epoch_env_steps: env steps in an epoch, over all ranks.
        save_memory: whether `state_dict` contains the memory.
        action_masks: whether the environments give action masks, which the memory then stores.
        overlap: whether the first step of the next iteration runs during the updates; its actions are chosen by the
            policy before these updates.
        sync: synchronization of the ranks; None for one rank.
    """

    def __init__(
        self,
        *,
        envs: VectorEnv[Any, Any, Any],
        memory: ReplayMemory,
        policy: Policy,
        seed: int | np.random.SeedSequence,
        steps_per_iteration: int,
        updates_per_iteration: int,
        batch_size: int,
        warmup_env_steps: int,
        epoch_env_steps: int,
        save_memory: bool = True,
        action_masks: bool = False,
        overlap: bool = False,
        sync: Sync | None = None,
    ) -> None:
        super().__init__()
        self.sync = sync or Sync()
        self.envs = envs
        self.collector = Collector(envs=envs, policy=policy, seed=seed, action_masks=action_masks, overlap=overlap)
        self.memory = memory
        self.episodes = self.collector.episodes
        self.updates_per_iteration = updates_per_iteration
        self.batch_size = batch_size
        self.warmup_env_steps = warmup_env_steps
        self.save_memory = save_memory
        self.overlap = overlap
        self._warm_at = warmup_env_steps
        self._iteration_env_steps = steps_per_iteration * envs.num_envs
        self._length = -(-epoch_env_steps // (self._iteration_env_steps * self.sync.world_size))

    def __len__(self) -> int:
        """Iterations in an epoch. Without a length, Lightning prefetches a batch, and with it env steps."""
        return self._length

    @property
    def epoch_env_steps(self) -> int:
        """Env steps in an epoch, rounded up to whole iterations."""
        return self._length * self._iteration_env_steps * self.sync.world_size

    @property
    def env_steps(self) -> int:
        """Env steps so far, summed over ranks."""
        return self.collector.env_steps if not self.sync.is_distributed else self.sync.env_steps

    def __iter__(self) -> Iterator[AnyTransition]:
        if get_worker_info() is not None:
            raise ValueError("num_workers > 0: the policy of a worker process is never updated; use num_workers=0")
        collector = self.collector
        for _ in range(len(self)):
            if collector.observation is None:
                self.memory.begin(collector.start(), collector.action_mask)
            for step in collector.steps(self._iteration_env_steps):
                self.memory.append(*step)
            if self.overlap:
                collector.send()
            if not self.sync.is_distributed:
                ready = collector.env_steps >= self._warm_at and len(self.memory) > 0
                yield self.memory.sample(self.updates_per_iteration if ready else 0, self.batch_size)
            else:
                yield self._sample_synchronized()

    def _sample_synchronized(self) -> AnyTransition:
        """Return the batch of this rank, with importance weights over all ranks; empty until all ranks can learn."""
        memory, sampler = self.memory, self.memory.sampler
        batch = memory.sample(self.updates_per_iteration if len(memory) else 0, self.batch_size)
        # all ranks must gather the same number of values
        stats = [len(memory), *sampler.local_stats(self.updates_per_iteration)]
        gathered = self.sync.all_gather(self.collector.env_steps, stats)
        if self.sync.env_steps < self._warm_at or not gathered[:, 0].all():
            return memory.sample(0, self.batch_size)
        factors = sampler.apply_global_stats(gathered[:, 1:])
        if factors is not None:
            batch.weight.mul_(torch.from_numpy(factors)[:, None])
        return batch

    def state_dict(self, *, with_envs: bool = True) -> dict[str, Any]:
        """Return the state as tensors and plain values; the memory is not copied, see `ReplayMemory.state_dict`.

        Args:
            with_envs: whether to include the environments, so that their episodes continue; requires the memory.

        Raises:
            BrokenEnvironmentError: if an environment raises in a pending step.
        """
        # an episode continues only with its earlier rows in the memory
        collector = self.collector.state_dict(with_envs=with_envs and self.save_memory)
        memory = {"memory": self.memory.state_dict()} if self.save_memory else {}
        return {**collector, "all_env_steps": self.env_steps, "warm_at": self._warm_at, **memory}

    def reopen(self, envs: VectorEnv[Any, Any, Any], state: Mapping[str, Any]) -> None:
        """Continue in new environments; see `Collector.reopen`."""
        self.envs = envs
        self.memory.truncate(self.collector.reopen(envs, state))

    def load_state_dict(self, state: Any, name: str = "train") -> Mask:
        """Restore what `state_dict` returned.

        Without the environments, new episodes start, and unfinished ones are stored as truncated. Without the memory,
        the warm-up starts again. With `memories`, those of all ranks of another world size, this rank loads its shard.

        Args:
            state: from `state_dict`.
            name: of the state in the checkpoint, for errors.

        Returns:
            (N,) True for environments that did not reproduce their episodes, which are stored as truncated.

        Raises:
            CheckpointError: if the state does not fit.
        """
        state = check_dict(state, name, ("env_steps", "all_env_steps", "warm_at"))
        all_env_steps = check_int(state["all_env_steps"], f"{name}.all_env_steps")
        self._warm_at = check_int(state["warm_at"], f"{name}.warm_at", high=all_env_steps + self.warmup_env_steps)
        self.sync.env_steps = all_env_steps
        if "memory" in state:
            self.memory.load_state_dict(state["memory"])
        elif "memories" in state:
            self.memory.refill(state["memories"], rank=self.sync.rank, world_size=self.sync.world_size)
        else:
            self._warm_at = all_env_steps + self.warmup_env_steps
            # as in `state_dict`
            state = {key: value for key, value in state.items() if key != "under_way"}
        missed = self.collector.load_state_dict(state, name, iteration_env_steps=self._iteration_env_steps)
        self.memory.truncate(missed & self.collector.resetting)
        return missed


class Chunk:
    """Consecutive iterations that Lightning treats as one batch, produced lazily in a single pass.

    `next` of its iterator steps the environments of one iteration and returns its batch.

    Args:
        batches: one batch per iteration.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        # a second pass, such as Lightning's inference of a batch size, must not step the environments
        batches, self._batches = self._batches, iter(())
        return batches


class TrainLoader:
    """Yields the iterations of an epoch in chunks, each of which Lightning treats as one batch.

    Chunk k ends after iteration (k + 1) * chunk_length of the epoch, or at its end, and begins where the previous one
    ended. The loader has no `state_dict`: Lightning would save a second copy of the dataset's state.

    Args:
        dataset: yields iterations; its length is that of an epoch.
        chunk_length: iterations in a chunk.
        trainer: its loop counts the chunks.
        iteration: first iteration of the first chunk, when an epoch is resumed.

    Attributes:
        iteration: number of iterations of the epoch that have started.
        was_cut: whether a signal ended the last chunk before its last iteration.
    """

    def __init__(self, dataset: Any, *, chunk_length: int, trainer: Trainer, iteration: int = 0) -> None:
        # Lightning warns of an IterableDataset with a length in an attribute `dataset`
        self._dataset = dataset
        self.chunk_length = chunk_length
        self.iteration = iteration
        self.was_cut = False
        self._trainer = trainer

    def __len__(self) -> int:
        """Chunks in an epoch. Without a length, Lightning prefetches a batch."""
        return math.ceil(len(self._dataset) / self.chunk_length)

    def __iter__(self) -> Iterator[Chunk]:
        length, iterations = len(self._dataset), iter(self._dataset)
        # chunks of the epoch that are complete: 0 unless an epoch is resumed
        complete = self._trainer.fit_loop.batch_idx + 1
        if self.iteration // self.chunk_length != complete or self.iteration >= length:
            self.iteration = complete * self.chunk_length
        while self.iteration < length:
            complete += 1
            yield Chunk(self._run(iterations, min(complete * self.chunk_length, length)))

    def _run(self, iterations: Iterator[Any], end: int) -> Iterator[Any]:
        """Yield the batches of the iterations up to `end`, or up to a signal."""
        self.was_cut = False
        while self.iteration < end and not self.was_cut:
            self.iteration += 1
            yield next(iterations)
            self.was_cut = self._dataset.sync.stop_signal != 0 and self.iteration < end


def chunk_length(trainer: Trainer, iterations_per_chunk: int | None, iteration_length: int) -> int:
    """Return the number of iterations in a chunk: 1 if the trainer stops or saves after a number of updates.

    Args:
        trainer: of the fit.
        iterations_per_chunk: the user's choice; None for 32 updates or steps per environment, at least one iteration.
        iteration_length: updates of an iteration, or steps per environment if these are more.
    """
    if counts_updates(trainer):
        return 1
    return iterations_per_chunk or max(1, 32 // iteration_length)
