"""Logs training statistics with env steps as the x-axis."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.losses import TDLoss
from lightning_dqn.run import data_of

if TYPE_CHECKING:
    from lightning_dqn.datamodule import DQNDataModule


class EpisodeStatistics(UpdateCallback):
    """Logs loss, values, epsilon, episodes and speed every `Trainer(log_every_n_steps)` iterations.

    Args:
        window: number of recent training episodes in train/episode_return and train/episode_length.

    Raises:
        ValueError: if window is not positive.
    """

    def __init__(self, *, window: int = 100) -> None:
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1 episode")
        self.window = window
        self._since = (0.0, 0, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make env_steps the x-axis in Weights & Biases."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.define_metric("env_steps", hidden=True)
                logger.experiment.define_metric("*", step_metric="env_steps", step_sync=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the measurement of the speed; a fit that resumes within an epoch does not call on_train_epoch_start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the measurement of the speed, which excludes evaluations."""
        self._since = (time.perf_counter(), data_of(trainer).env_steps, trainer.global_step)

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Log every `log_every_n_steps` iterations."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        data = data_of(trainer)
        if not every or data.train_loader.iteration % every or not trainer.loggers:
            return
        metrics = {
            "train/epsilon": pl_module.read_epsilon(),
            **self._clocks(trainer),
            **self._episodes(trainer, data),
        }
        if results:
            metrics["train/loss"] = float(torch.stack([each.loss for each in results]).mean())
            metrics["train/q_value"] = float(torch.cat([each.q_value for each in results]).mean())
            metrics["train/td_error"] = float(torch.cat([each.td_error for each in results]).abs().mean())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=data.env_steps)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the evaluation with the same x-axis; Lightning passes `step` to the loggers."""
        if trainer.state.fn == "fit":
            env_steps = float(data_of(trainer).env_steps)
            pl_module.log_dict({"env_steps": env_steps, "step": env_steps, "updates": float(trainer.global_step)})

    def _clocks(self, trainer: Trainer) -> dict[str, float]:
        """Env steps and updates, and their speeds since the last call."""
        now = (time.perf_counter(), data_of(trainer).env_steps, trainer.global_step)
        seconds, env_steps, updates = (a - b for a, b in zip(now, self._since, strict=True))
        self._since = now
        return {
            "env_steps": now[1],
            "updates": now[2],
            "env_steps_per_second": env_steps / seconds,
            "updates_per_second": updates / seconds,
        }

    def _episodes(self, trainer: Trainer, data: "DQNDataModule") -> dict[str, float]:
        """Mean return and length of the last episodes of all ranks; empty before the first has ended."""
        returns, lengths = data.episodes.returns[-self.window :], data.episodes.lengths[-self.window :]
        # a fixed dtype: without episodes the sums are integers, but all ranks must send the same dtype
        sums = [sum(returns), sum(lengths), len(returns)]
        own = torch.tensor(sums, dtype=torch.float32, device=trainer.strategy.root_device)
        sum_of_returns, sum_of_lengths, count = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        if not count:
            return {}
        return {"train/episode_return": sum_of_returns / count, "train/episode_length": sum_of_lengths / count}
