"""Sees that the networks of all ranks are still the same, to the bit: an option for who doubts it."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dqn.callbacks import data_of
from lightning_dqn.resume.training_state import weights_digest


class RankCheck(Callback):
    """Compares hashes of both networks over all ranks, every k updates; ends the fit where they differ.

    Sync start from the same weights and move them by the same gradients, so they stay the same. What breaks that is a
    fault: weights changed on one rank alone, by a callback or a network of one's own, or broken hardware.

    Args:
        every_n_updates: from one look to the next, k; the iteration is ended first.

    Raises:
        ValueError: if every_n_updates is not positive.
    """

    def __init__(self, *, every_n_updates: int = 1000) -> None:
        if every_n_updates < 1:
            raise ValueError(f"every_n_updates={every_n_updates}: must be at least 1")
        self.every_n_updates = every_n_updates
        self._periods = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what the ranks begin with."""
        self._periods = trainer.global_step // self.every_n_updates
        self._compare(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time."""
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
        first, *others = (said.split(", ") for said in sync.gather(", ".join(own)))
        for rank, other in enumerate(others, start=1):
            for expected, found in zip(first, other, strict=True):
                if found != expected:
                    raise RuntimeError(
                        f"{found.split()[0]} of rank {rank} is not that of rank 0 any more, after "
                        f"{trainer.global_step:,} updates: something changes weights on one rank alone; find it, and "
                        "go on from an earlier checkpoint"
                    )
