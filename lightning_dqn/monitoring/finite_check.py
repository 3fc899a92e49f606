"""Ends a fit whose loss or weights are no numbers any more, before a good checkpoint is overwritten."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dqn.callbacks import data_of


class FiniteCheck(Callback):
    """Looks at the loss every k iterations, and at all weights before an evaluation and before every checkpoint.

    A NaN never leaves the weights again, so a fit ends within k iterations, k times U updates, and nothing is saved
    from the update on that went wrong. Looking seldom keeps a GPU from waiting for it.

    Args:
        every_n_iterations: from one look at the loss to the next, k.

    Raises:
        ValueError: if every_n_iterations is not positive.
    """

    def __init__(self, *, every_n_iterations: int = 50) -> None:
        if every_n_iterations < 1:
            raise ValueError(f"every_n_iterations={every_n_iterations}: must be at least 1")
        self.every_n_iterations = every_n_iterations

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss, if it is time; else cost nothing."""
        if (batch_idx + 1) % self.every_n_iterations == 0 and outputs:
            loss = float(outputs["loss"].sum())
            if not math.isfinite(loss):
                _raise_not_finite(trainer, f"the loss is {loss}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Don't evaluate what can't act."""
        if trainer.state.fn == "fit":
            _check_weights(trainer, pl_module.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called before anything is written; an error here leaves the file of before as it is."""
        _check_weights(trainer, checkpoint["state_dict"])


def _check_weights(trainer: Trainer, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if not torch.isfinite(value).all():
            _raise_not_finite(trainer, f"{name} is not finite")


def _raise_not_finite(trainer: Trainer, what: str) -> None:
    raise FloatingPointError(
        f"{what} after {trainer.global_step:,} updates and {data_of(trainer).env_steps:,} env steps: not saved, the "
        "checkpoints of before are unchanged; lower model.optimizer.lr, model.clip_grad_value or model.reward_scale"
    )
