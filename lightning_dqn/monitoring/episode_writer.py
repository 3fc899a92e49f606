"""Writes the episodes of `Trainer.predict` to a file."""

import itertools
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_dqn.run import data_of, run_folder


class EpisodeWriter(Callback):
    """Writes `episodes.pt`, a list with a dict of tensors for each greedy episode, for `torch.load`.

    The tensors are observation (T, ...), action (T,), reward (T,) and q_values (T, A) over its T env steps.
    """

    def __init__(self) -> None:
        self._episodes: list[dict[str, Tensor]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty list."""
        self._episodes = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Add one episode."""
        self._episodes.append({name: tensor.cpu() for name, tensor in outputs.items()})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the episodes of all ranks."""
        sync = data_of(trainer).sync
        if sync.is_distributed:
            self._episodes = list(itertools.chain(*sync.gather_to_rank_zero(self._episodes)))
        if trainer.is_global_zero:
            path = run_folder(trainer) / "episodes.pt"
            torch.save(self._episodes, path)
            rank_zero_info(f"{len(self._episodes)} episodes with their action values: {path}")
