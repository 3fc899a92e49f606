"""The LightningCLI of this package: its links, defaults and errors."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_dqn._compat.lightning import (
    ignore_checkpoint_folder_warning,
    ignore_intended_warnings,
    remove_callback_argument,
    silence_tips,
)
from lightning_dqn.callbacks import EpsilonSchedule, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.cli.checks import check_arguments, check_processes, check_writable
from lightning_dqn.cli.defaults import BEST, SaveConfig, trainer_defaults
from lightning_dqn.cli.errors import DQNArgumentParser, debugging, exit_with_error
from lightning_dqn.cli.from_checkpoint import config_of
from lightning_dqn.cli.optimizers import check_class_before_arguments, reset_init_args_on_class_change
from lightning_dqn.cli.runs import (
    DEFAULT_ROOT,
    flags_of,
    new_run_folder,
    read_checkpoint,
    relocate_best,
    requeued_run,
    resolve_checkpoint,
    run_dir_of,
)
from lightning_dqn.cli.tracking import continue_wandb, prepare_logger, start_wandb
from lightning_dqn.datamodule import DQNDataModule
from lightning_dqn.distributed.sync import is_peer_lost, peer_lost_error
from lightning_dqn.envs.errors import BrokenEnvironmentError
from lightning_dqn.module import DQN
from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar
from lightning_dqn.resume.allocation import AllocationLimit
from lightning_dqn.resume.checkpoint import check_checkpoint, load_weights
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.folder import remove_stale_files
from lightning_dqn.resume.stop_on_signal import StoppedBySignal
from lightning_dqn.sampling import PrioritizedSampler  # noqa: F401  for `--data.sampler PrioritizedSampler`
from lightning_dqn.validation import check_learner


class DQNCLI(LightningCLI):
    """LightningCLI with default schedules and one folder per run; see `main` for its arguments."""

    def __init__(self, args: Any = None, callbacks: Iterable[Callback] = ()) -> None:
        self._first_word = next(iter(sys.argv[1:] if args is None else args), "")
        super().__init__(
            DQN,
            DQNDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=trainer_defaults(callbacks),
            seed_everything_default=0,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "python -m lightning_dqn", "description": "Deep Q-learning on Gymnasium."},
            parser_class=DQNArgumentParser,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method in Lightning
        """The subcommand on the command line, or all of them: creating a parser takes 0.04 s."""
        every = super().subcommands()
        return {self._first_word: every[self._first_word]} if self._first_word in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the environment's spaces to the model, and add the arguments of callbacks."""
        parser.set_defaults({"model": {"class_path": "lightning_dqn.DQN"}})
        for space in ("observation_space", "action_space"):
            parser.link_arguments(f"data.{space}", f"model.init_args.{space}", apply_on="instantiate")
        parser.add_argument(
            "--init_from", type=str | None, default=None, help="checkpoint whose weights a new run starts from"
        )
        parser.add_argument(
            "--trust",
            type=str | None,
            default=None,
            help="your own modules, separated by commas, from which a checkpoint may name classes and environments",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({f"checkpoint.{name}": value for name, value in BEST.items()})
        parser.add_lightning_class_args(SoftTargetUpdate, "target_update")
        parser.add_lightning_class_args(EpsilonSchedule, "epsilon", subclass_mode=True, required=False)
        parser.set_defaults({"epsilon": {"class_path": "lightning_dqn.EpsilonDecay"}})
        parser.add_lightning_class_args(PriorityUpdate, "priorities")
        parser.add_lightning_class_args(RunProgressBar, "progress_bar")
        parser.add_lightning_class_args(EpisodePlot, "plot")
        parser.add_lightning_class_args(AgentVideo, "video")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, preceded by the configuration of `--ckpt_path` unless `--config` is given."""
        words = resolve_checkpoint(list(sys.argv[1:] if args is None else args))
        if args is None:
            # Lightning starts the other ranks with sys.argv: `last` must be the same run there
            sys.argv[1:] = words
        self.asked_for_logger = any(word.startswith("--trainer.logger") for word in words)
        check_class_before_arguments(words)
        words = self._with_checkpoint(words)
        with reset_init_args_on_class_change():
            self.config = parser.parse_args(words)
        run = self.config[self.config.subcommand]
        if not isinstance(run.seed_everything, bool) and not 0 <= run.seed_everything < 2**32:
            exit_with_error(ValueError(f"seed_everything={run.seed_everything}: must be in [0, 2**32)"))
        try:
            check_arguments(run)
        except ValueError as error:
            exit_with_error(error)

    def _with_checkpoint(self, words: list[str]) -> list[str]:
        """Insert the configuration of a checkpoint before the options of the command line."""
        self.checkpoint_io = AtomicCheckpointIO()
        self.checkpoint: dict[str, Any] | None = None
        self.weights: dict[str, Any] | None = None
        flags = dict(flags_of(words))
        path, weights = flags.get("--ckpt_path"), flags.get("--init_from")
        if path is not None and weights is not None:
            exit_with_error(
                ValueError(f"--ckpt_path {path}, --init_from {weights}: resume a run or start a new one, not both")
            )
        if weights is not None:
            self.weights = read_checkpoint(AtomicCheckpointIO(), weights, "--init_from", for_fit=False)
        if path is None:
            return words
        self.checkpoint = read_checkpoint(self.checkpoint_io, path, "--ckpt_path", for_fit=words[0] == "fit")
        if "--config" in flags or "-c" in flags:
            return words
        given = {name.removeprefix("--").replace("init_args.", "") for name in flags}
        trusted = [name for name in flags.get("--trust", "").split(",") if name]
        try:
            config = config_of(self.checkpoint, given, trusted)
        except CheckpointError as error:
            exit_with_error(CheckpointError(f"--ckpt_path {path}: {error}"))
        return [words[0], "--config", yaml.safe_dump(config), *words[1:]]

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder. The saved config.yaml does not contain it, so that it can be reused."""
        self._given = self.config.clone()
        run = self.config[self.subcommand]
        root = Path(run.trainer.default_root_dir or DEFAULT_ROOT)
        earlier = run_dir_of(run.ckpt_path)
        if self.subcommand == "fit" and run.ckpt_path is None:
            earlier = requeued_run(root)
        self.is_new = self.subcommand == "fit" and earlier is None
        if self.subcommand == "fit":
            self.folder = earlier or self._new_folder(root, run.data.env_id)
        else:
            self.folder = (earlier or root) / "evaluation"
        run.trainer.default_root_dir = str(self.folder)
        if self.subcommand != "fit" and not self.asked_for_logger:
            run.trainer.logger = False
        loggers = run.trainer.logger if isinstance(run.trainer.logger, list) else [run.trainer.logger]
        self.offline_because = ""
        for logger in loggers:
            if isinstance(logger, Namespace):
                self.offline_because += prepare_logger(logger, self.folder, resumed=not self.is_new)
                if self.subcommand == "fit" and not self.is_new:
                    continue_wandb(logger)

    def _new_folder(self, root: Path, env_id: str) -> Path:
        """Create a new, writable folder."""
        folder = None
        try:
            folder = new_run_folder(root, env_id)
            # rank 0 creates it, possibly later than the others get here
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                check_writable(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.removedirs(folder or root)
            exit_with_error(
                OSError(f"trainer.default_root_dir={root}: is not writable ({error}); choose another or free space")
            )
        return folder

    def instantiate_classes(self) -> None:
        """Instantiate all classes; an error removes the new folder and is printed in one line."""
        try:
            with contextlib.nullcontext() if self.checkpoint is None else AllocationLimit(self.checkpoint):
                super().instantiate_classes()
            check_learner(self.datamodule, on_policy=self.model.on_policy, munchausen=self.model.munchausen)
            if self.weights is not None:
                load_weights(self.model, self.weights)
            if self.checkpoint is not None:
                resumed = (self.trainer, self.datamodule) if self.subcommand == "fit" else ()
                check_checkpoint(self.checkpoint, self.model, *resumed)
                if self.subcommand == "fit":
                    relocate_best(self.checkpoint, self.trainer.checkpoint_callbacks)
            # free the replay memory in the checkpoint
            self.checkpoint = self.weights = None
        except (ValueError, TypeError, ImportError, MisconfigurationException, CheckpointError) as error:
            if self.is_new:
                with contextlib.suppress(OSError):
                    os.removedirs(self.folder)
            exit_with_error(error)
        self._announce()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer with the checkpoint plugin, and with the run's folder for checkpoints."""
        self.config = self._given
        assert self.subcommand is not None
        run = self.config_init[self.subcommand]
        if run.trainer.enable_progress_bar is False:
            remove_callback_argument(self, self.subcommand, "progress_bar")
        plugins = run.trainer.plugins or []
        others = plugins if isinstance(plugins, list) else [plugins]
        trainer = super().instantiate_trainer(plugins=[self.checkpoint_io, *others], **kwargs)
        check_processes(trainer)
        # the folder of the loaded checkpoint, which contains the best one
        folder = Path(run.ckpt_path).parent if run_dir_of(run.ckpt_path) else self.folder / "checkpoints"
        path = os.path.relpath(folder) if folder.resolve().is_relative_to(Path.cwd()) else str(folder)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = path
        if self.subcommand == "fit" and trainer.is_global_zero:
            # Lightning's SLURM checkpoint is in the parent folder
            for place in (folder, self.folder):
                remove_stale_files(place)
        if run.ckpt_path or not self.is_new:
            ignore_checkpoint_folder_warning()
        return trainer

    def _announce(self) -> None:
        """Start W&B, and report an offline run or missing weights."""
        run = self.config[self.subcommand]
        if self.subcommand != "fit" and not (run.ckpt_path or run.init_from):
            rank_zero_info("No --ckpt_path: the networks are not trained.")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                self.offline_because += start_wandb(logger)
        if self.offline_because:
            rank_zero_info(f"W&B is offline: {self.offline_because}. `wandb sync` uploads the run later.")


def main(args: Any = None, callbacks: Iterable[Callback] = ()) -> None:
    """Run the command line; errors that the user can correct are printed in one line.

    Args:
        args: its arguments; None for those of the process.
        callbacks: callbacks of the trainer in addition to the default ones.
    """
    # few objects become garbage before the first step: the default threshold of 700 costs 0.1 s
    gc.set_threshold(50_000)
    if "OMP_NUM_THREADS" not in os.environ:
        # a second thread gains 10 % on an idle machine; with a busy core it is 65 times slower than one thread
        torch.set_num_threads(1)
    silence_tips()
    ignore_intended_warnings()
    try:
        DQNCLI(args, callbacks)
    except (MisconfigurationException, FileNotFoundError, CheckpointError, FloatingPointError) as error:
        exit_with_error(error)
    except BrokenEnvironmentError as fault:
        # an exception of the environment is shown with its traceback
        if fault.__cause__ is not None:
            raise
        exit_with_error(fault)
    except RuntimeError as error:
        if debugging() or not is_peer_lost(error):
            raise
        sys.stderr.write(f"error: {peer_lost_error()}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        _exit(130)
    except SystemExit as left:
        # Lightning exits with 1 and 0
        if isinstance(left.__context__, KeyboardInterrupt):
            _exit(130)
        if isinstance(left, SIGTERMException):
            _exit(143)
        if isinstance(left, StoppedBySignal):
            _exit(left.code)
        raise


def _exit(code: Any) -> NoReturn:
    """Exit and ignore SIGINT: another Ctrl-C during the shutdown would only print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # W&B's agent counts any other exit code as a failure, also of a run that it stopped, and ends after three
    sys.exit(0 if code == 143 and "WANDB_SWEEP_ID" in os.environ else code)
