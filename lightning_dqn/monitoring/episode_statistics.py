"""Logs how training goes, with env steps as the x-axis of every curve."""

import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_dqn.callbacks import data_of

if TYPE_CHECKING:
    from lightning_dqn.data import DQNDataModule


class EpisodeStatistics(Callback):
    """Logs loss, values, epsilon, episodes and speed every `Trainer(log_every_n_steps)` iterations.

    Args:
        window: training episodes that train/episode_return and train/episode_length are means of.

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
        """A fit that goes on in mid-epoch starts none: its speed is counted from here."""
        self._since = (time.perf_counter(), data_of(trainer).env_steps, trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluation lies between epochs: it is not counted into the speed of training."""
        self._since = (time.perf_counter(), data_of(trainer).env_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, if it is time; else cost nothing."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (batch_idx + 1) % every or not trainer.loggers:
            return
        data = data_of(trainer)
        metrics = {
            "train/epsilon": pl_module.read_epsilon(),
            **self._clocks(trainer),
            **self._episodes(trainer, data),
        }
        if outputs:
            metrics["train/loss"] = float(outputs["loss"].mean())
            metrics["train/q_value"] = float(outputs["q_value"].mean())
            metrics["train/td_error"] = float(outputs["td_error"].abs().mean())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=data.env_steps)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay the evaluation on the same x-axis; Lightning takes `step` as the loggers' own."""
        if trainer.state.fn == "fit":
            env_steps = float(data_of(trainer).env_steps)
            pl_module.log_dict({"env_steps": env_steps, "step": env_steps, "updates": float(trainer.global_step)})

    def _clocks(self, trainer: Trainer) -> dict[str, float]:
        """Where the clocks stand, and how fast they have run since the last call."""
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
        """Mean return and length of the last episodes of each rank; nothing before the first has ended."""
        returns, lengths = data.episodes.returns[-self.window :], data.episodes.lengths[-self.window :]
        # of a type that does not hang on whether there are any: all ranks must send the same
        sums = [sum(returns), sum(lengths), len(returns)]
        own = torch.tensor(sums, dtype=torch.float32, device=trainer.strategy.root_device)
        sum_of_returns, sum_of_lengths, count = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        if not count:
            return {}
        return {"train/episode_return": sum_of_returns / count, "train/episode_length": sum_of_lengths / count}
