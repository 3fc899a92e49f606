"""Loaders that pass on what a dataset plays, in this process and without Lightning's warnings about it."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_dqn.data.replay_dataset import ReplayDataset
from lightning_dqn.replay import Chunk
from lightning_dqn.variants.rollouts import RolloutDataset


class TrainLoader:
    """Yields the iterations of an epoch in chunks, each of which Lightning takes for one batch.

    Chunk k of an epoch ends behind iteration (k + 1) * chunk_length, or with the epoch; it begins where the last one
    ended. It has no state that Lightning could find: of a dataset that has one it would save a second copy, memory
    included.

    Args:
        dataset: with a length, the iterations of an epoch.
        chunk_length: iterations in a chunk.
        trainer: whose loop counts the chunks.
        iteration: of the epoch, at which the first chunk begins in a resumed run.

    Attributes:
        iteration: iterations of the epoch that have begun.
        was_cut: whether a signal ended the last chunk before its last iteration.
    """

    def __init__(
        self, dataset: ReplayDataset | RolloutDataset, *, chunk_length: int, trainer: Trainer, iteration: int = 0
    ) -> None:
        self.dataset = dataset
        self.chunk_length = chunk_length
        self.iteration = iteration
        self.was_cut = False
        self._trainer = trainer

    def __len__(self) -> int:
        """Chunks in an epoch. Without it Lightning would fetch one batch ahead."""
        return math.ceil(len(self.dataset) / self.chunk_length)

    def __iter__(self) -> Iterator[Chunk]:
        length, iterations = len(self.dataset), iter(self.dataset)
        # 0, unless an epoch is resumed
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
            self.was_cut = self.dataset.sync.stop_signal != 0 and self.iteration < end


def chunk_length(trainer: Trainer, iterations_per_chunk: int | None, iteration_length: int) -> int:
    """Iterations in a chunk of a fit: 1 where the trainer counts updates, which it can do between chunks only.

    Args:
        trainer: of the fit.
        iterations_per_chunk: as it was given; None for 32 updates or steps of an environment, at least one iteration.
        iteration_length: updates, or steps in each environment, of one iteration, whichever is larger.
    """
    counts = any(
        each._every_n_train_steps > 0 for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)
    )
    if counts or trainer.max_steps >= 0:
        return 1
    return iterations_per_chunk or max(1, 32 // iteration_length)


def passthrough_loader(dataset: IterableDataset[Any] | None) -> DataLoader[Any]:
    """A loader that passes items through: the policy lives here, so workers would play with stale weights."""
    assert dataset is not None
    ignore_warnings()
    return DataLoader(dataset, batch_size=None, num_workers=0, collate_fn=_identity)


def ignore_warnings() -> None:
    """Say nothing of what is so on purpose."""
    # Lightning asks torch's pytree in an old way; nothing of ours
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Lightning warns of iterable datasets with a length, and of few workers; ours plays in one process, on purpose
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # what is logged at the end of an evaluation is of all ranks already
    warnings.filterwarnings("ignore", message=".*sync_dist=True")
    # and of loaders without a state at a resume; ours has its state in the data module
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")


def _identity(item: Any) -> Any:
    return item
