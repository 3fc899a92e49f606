"""An optional check that the networks of all ranks stay bitwise equal."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dqn.run import data_of


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bytes of all tensors."""
    found = hashlib.sha256()
    for tensor in state.values():
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class RankCheck(Callback):
    """Compares hashes of the networks of all ranks every k updates, and ends the fit if they differ.

    All ranks start with the same weights and apply the same gradients, so their networks stay equal. A difference means
    that a callback, a custom network or broken hardware changed the weights of one rank only.

    Args:
        every_n_updates: updates between two checks, k; a check runs at the end of a chunk of iterations.

    Raises:
        ValueError: if every_n_updates is not positive.
    """

    def __init__(self, *, every_n_updates: int = 1000) -> None:
        if every_n_updates < 1:
            raise ValueError(f"every_n_updates={every_n_updates}: must be at least 1")
        self.every_n_updates = every_n_updates
        self._periods = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the initial networks."""
        self._periods = trainer.global_step // self.every_n_updates
        self._compare(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare every k updates."""
        periods = trainer.global_step // self.every_n_updates
        if periods != self._periods:
            self._periods = periods
            self._compare(trainer, pl_module)

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the networks of all ranks.

        Raises:
            RuntimeError: naming the first rank and network that differ.
        """
        sync = data_of(trainer).sync
        if not sync.is_distributed:
            return
        shared = {"policy_net", "target_net", "normalizer"}
        nets = [(name, net) for name, net in pl_module.named_children() if name in shared]
        own = [f"{name} {weights_digest(net.state_dict())}" for name, net in nets]
        first, *others = (text.split(", ") for text in sync.gather(", ".join(own)))
        for rank, other in enumerate(others, start=1):
            for expected, found in zip(first, other, strict=True):
                if found != expected:
                    raise RuntimeError(
                        f"{found.split()[0]} of rank {rank} differs from rank 0 after "
                        f"{trainer.global_step:,} updates: weights were changed on one rank only; find the cause, and "
                        "resume from an earlier checkpoint"
                    )
