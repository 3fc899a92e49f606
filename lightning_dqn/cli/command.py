"""LightningCLI as this package wants it: what is linked, what every run has, what is the default."""

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.callbacks import (
    AgentVideo,
    EpisodePlot,
    EpisodeStatistics,
    EpisodeWriter,
    EpsilonDecay,
    RunProgressBar,
    RunSummary,
    SoftTargetUpdate,
)
from lightning_dqn.callbacks.context import run_folder
from lightning_dqn.cli.errors import DQNArgumentParser, refuse
from lightning_dqn.cli.runs import DEFAULT_ROOT, eval_folder, new_run_folder, with_run_config
from lightning_dqn.cli.tracking import prepare_logger
from lightning_dqn.data import DQNDataModule
from lightning_dqn.module import DQN

TRAINER_DEFAULTS: dict[str, Any] = {
    "callbacks": [
        EpisodeStatistics(),
        EpisodeWriter(),
        RunSummary(),
        ModelCheckpoint(filename="last", save_on_exception=True, enable_version_counter=False),
    ],
    "max_epochs": 40,
    "num_sanity_val_steps": 0,
    "logger": {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "lightning_dqn"},
    },
}
BEST = {"monitor": "val/episode_return", "mode": "max", "filename": "best", "auto_insert_metric_name": False}


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder, and to the loggers, before the first step."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning once a run."""
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_none=False)
        (run_folder(trainer) / "config.yaml").write_text(text)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))


class DQNCLI(LightningCLI):
    """LightningCLI with the textbook's schedules in place and one folder a run."""

    def __init__(self, args: Any = None) -> None:
        super().__init__(
            DQN,
            DQNDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "python -m lightning_dqn", "description": "Deep Q-learning on Gymnasium."},
            parser_class=DQNArgumentParser,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what the environment decides, add what the algorithm needs."""
        parser.set_defaults({"model": {"class_path": "lightning_dqn.DQN"}})
        for space in ("observation_space", "action_space"):
            parser.link_arguments(f"data.{space}", f"model.init_args.{space}", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({f"checkpoint.{name}": value for name, value in BEST.items()})
        parser.add_lightning_class_args(SoftTargetUpdate, "target_update")
        parser.add_lightning_class_args(EpsilonDecay, "epsilon")
        parser.add_lightning_class_args(EpisodePlot, "plot")
        parser.add_lightning_class_args(AgentVideo, "video")
        parser.add_lightning_class_args(RunProgressBar, "progress_bar")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Find the run that `--ckpt_path` means, and take its configuration where no other is given."""
        words = list(sys.argv[1:] if args is None else args)
        self.asked_for_logger = any(word.startswith("--trainer.logger") for word in words)
        self.config = parser.parse_args(with_run_config(words))

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder. What is saved as config.yaml names no folder, so that it can be used again."""
        self._given = self.config.clone()
        run = self.config[self.subcommand]
        root = Path(run.trainer.default_root_dir or DEFAULT_ROOT)
        self.folder = new_run_folder(root, run.data.env_id) if self.subcommand == "fit" else eval_folder(run, root)
        run.trainer.default_root_dir = str(self.folder)
        if self.subcommand != "fit" and not self.asked_for_logger:
            run.trainer.logger = False
        loggers = run.trainer.logger if isinstance(run.trainer.logger, list) else [run.trainer.logger]
        reasons = [prepare_logger(logger, self.folder) for logger in loggers if isinstance(logger, Namespace)]
        self.offline_because = "".join(reasons)

    def instantiate_classes(self) -> None:
        """Make everything; what can't be made is said in one line, and leaves no folder behind."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            with contextlib.suppress(OSError):
                os.removedirs(self.folder)
            refuse(error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let checkpoints lie with the rest of the run."""
        self.config = self._given
        if self.config_init[self.subcommand].trainer.enable_progress_bar is False:
            self._parser(self.subcommand).callback_keys.remove("progress_bar")
        trainer = super().instantiate_trainer(**kwargs)
        if self.offline_because:
            rank_zero_info(f"W&B is offline: {self.offline_because}. `wandb sync` uploads the run later.")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                checkpoint = self.config[self.subcommand].ckpt_path if self.subcommand != "fit" else None
                folder = Path(checkpoint).parent if checkpoint else run_folder(trainer) / "checkpoints"
                callback.dirpath = str(folder)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # Lightning hands on an argument that wandb warns of whatever its value
                logger._wandb_init.pop("anonymous", None)
        return trainer


def main(args: Any = None) -> None:
    """Run the command line; what the user can mend is said in one line."""
    # Lightning asks torch's pytree in an old way; nothing of ours
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡 Tip" not in record.msg)
    try:
        DQNCLI(args)
    except (MisconfigurationException, FileNotFoundError) as error:
        refuse(error)
