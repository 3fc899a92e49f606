"""Defaults of all runs of the command line: callbacks, logger, saved configuration."""

from collections.abc import Iterable
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from lightning_dqn._compat.lightning import broadcast_root_dir
from lightning_dqn.cli.from_checkpoint import options_of
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics
from lightning_dqn.monitoring.episode_writer import EpisodeWriter
from lightning_dqn.monitoring.finite_check import FiniteCheck
from lightning_dqn.monitoring.run_summary import RunSummary
from lightning_dqn.resume.stop_on_signal import StopOnSignal
from lightning_dqn.run import run_folder

BEST = {"monitor": "val/episode_return", "mode": "max", "filename": "best", "auto_insert_metric_name": False}


def trainer_defaults(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Default arguments of the trainer; `callbacks` are added to those of every run."""
    return {
        "callbacks": [
            EpisodeStatistics(),
            EpisodeWriter(),
            RunSummary(),
            FiniteCheck(),
            *callbacks,
            StopOnSignal(),
            # not `save_on_exception`: it would replace the last good state by one within a step
            ModelCheckpoint(filename="last", enable_version_counter=False),
        ],
        "max_epochs": 40,
        # "auto" would use all GPUs of the machine, so that the effective batch size depends on the machine
        "devices": 1,
        "num_sanity_val_steps": 0,
        "logger": {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"project": "lightning_dqn"},
        },
    }


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder, and to the loggers, before the first step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the folder of rank 0 on all ranks: its name contains the time, which differs between ranks."""
        broadcast_root_dir(trainer)
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the options of the run that are not in its manifest."""
        checkpoint["options"] = options_of(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration; called by Lightning once per run."""
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_none=False)
        (run_folder(trainer) / "config.yaml").write_text(text)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))
