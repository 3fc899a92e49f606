"""Stops a fit if the loss or the weights are not finite, before a checkpoint is overwritten."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.losses import TDLoss
from lightning_dqn.run import data_of


class FiniteCheck(UpdateCallback):
    """Checks the loss every k iterations, and all weights before an evaluation and before every checkpoint.

    NaN in the weights persists, so the fit stops within k iterations, and no later state is saved. Each check
    synchronizes with the GPU.

    Args:
        every_n_iterations: iterations between two checks of the loss, k.

    Raises:
        ValueError: if every_n_iterations is not positive.
    """

    def __init__(self, *, every_n_iterations: int = 50) -> None:
        if every_n_iterations < 1:
            raise ValueError(f"every_n_iterations={every_n_iterations}: must be at least 1")
        self.every_n_iterations = every_n_iterations

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Check the loss every k iterations."""
        if results and data_of(trainer).train_loader.iteration % self.every_n_iterations == 0:
            loss = float(torch.stack([each.loss for each in results]).sum())
            if not math.isfinite(loss):
                _raise_not_finite(trainer, f"the loss is {loss}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights before an evaluation."""
        if trainer.state.fn == "fit":
            _check_weights(trainer, pl_module.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the weights before a checkpoint is written; an error leaves the previous one unchanged."""
        _check_weights(trainer, checkpoint["state_dict"])


def _check_weights(trainer: Trainer, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if not torch.isfinite(value).all():
            _raise_not_finite(trainer, f"{name} is not finite")


def _raise_not_finite(trainer: Trainer, what: str) -> None:
    raise FloatingPointError(
        f"{what} after {trainer.global_step:,} updates and {data_of(trainer).env_steps:,} env steps: not saved, the "
        "previous checkpoints are unchanged; lower lr, clip_grad_value or reward_scale"
    )
