"""Loaders that pass on what a dataset plays, in this process and without Lightning's warnings about it."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_dqn.data.replay_dataset import ReplayDataset
from lightning_dqn.variants.rollouts import RolloutDataset


class TrainLoader:
    """Iterates a dataset, and nothing else: a DataLoader around it would cost a tenth of an iteration.

    It has no state that Lightning could find: of a dataset that has one it would save a second copy, memory included.

    Args:
        dataset: with a length.
    """

    def __init__(self, dataset: ReplayDataset | RolloutDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Iterations in an epoch."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


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
