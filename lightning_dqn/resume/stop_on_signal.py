"""Stops a fit on a signal, at the end of an iteration, with a complete checkpoint."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dqn.distributed.sync import Sync
from lightning_dqn.resume.manifest import describe_run
from lightning_dqn.resume.rebuild import trust_option
from lightning_dqn.run import data_of, run_folder

# SLURM's signal before the end of a job; Windows has none
REQUEUE = getattr(signal, "SIGUSR1", None)
# one Ctrl-C reaches a rank twice if its launcher forwards it
ECHO_SECONDS = 2.0


class StoppedBySignal(SystemExit):
    """Ends the process with exit code 128 + signal and no traceback, after Lightning has torn down the fit."""


class StopOnSignal(Callback):
    """Ends a fit on SIGTERM or SIGINT (Ctrl-C) at the end of the current iteration, with exit code 143 or 130.

    The whole state is saved in `last.ckpt`, in the folder of the run's checkpoints. A signal during an evaluation takes
    effect at the end of the next iteration; if there is none, the fit ends normally. A second SIGINT ends the fit at
    once, as in Lightning, without saving. If Lightning requeues SLURM jobs on SIGUSR1, its checkpoint is saved at the
    end of a chunk. Outside of the main thread, where Python allows no signal handlers, Lightning's handlers remain.
    The callback must be the last one of the trainer, so that the others have completed the iteration.

    The next `Sync.all_gather` sends a signal of one rank to all ranks; all stop at the end of that iteration.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._sync: Sync | None = None
        self._received_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the signal handlers that Lightning has just set."""
        self._sync = data_of(trainer).sync
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            # shells ignore SIGINT in background jobs
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._on_signal)
        if REQUEUE is not None and callable(signal.getsignal(REQUEUE)):
            self._before[REQUEUE] = signal.signal(REQUEUE, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Record the signal; it is handled between iterations, where the state is consistent."""
        sync = self._sync
        assert sync is not None
        if signum == REQUEUE:
            sync.requeue_asked = True
        elif not sync.received_signal:
            sync.received_signal = signum
            if not sync.is_distributed:
                sync.stop_signal = signum
            self._received_at = time.monotonic()
            if signum == signal.SIGINT and sync.rank == 0:
                # os.write is reentrant, Python's buffered streams are not
                os.write(2, b"\nCtrl-C: saving when this iteration is complete; once more stops at once\n")
        elif signum == signal.SIGINT and (
            not sync.is_distributed or time.monotonic() - self._received_at > ECHO_SECONDS
        ):
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal was received, except after the last iteration of an epoch.

        Lightning would skip the evaluation when it resumes there, and a whole epoch when it resumes at its start.
        """
        if any(self._requests()) and (not trainer.is_last_batch or data_of(trainer).train_loader.was_cut):
            self._handle_requests(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a signal was received and epochs have only one chunk."""
        if any(self._requests()) and trainer.num_training_batches == 1:
            self._handle_requests(trainer)

    def _requests(self) -> tuple[int, bool]:
        """The signal, or 0, and whether SLURM requeues the job; with several ranks, as of the last `all_gather`."""
        sync = self._sync
        assert sync is not None
        return sync.stop_signal, sync.requeue_agreed if sync.is_distributed else sync.requeue_asked

    def _handle_requests(self, trainer: Trainer) -> None:
        """Save for SLURM, or save and stop."""
        asked, requeue = self._requests()
        if requeue and REQUEUE in self._before:
            assert self._sync is not None
            self._sync.requeue_asked = self._sync.requeue_agreed = False
            self._before[REQUEUE](REQUEUE, None)
        if not asked:
            return
        name = signal.Signals(asked).name
        note = f"Stopped by {name} at {data_of(trainer).env_steps:,} env steps"
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = _checkpoint_folder(trainer) / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            run = describe_run(trainer.lightning_module, trainer.datamodule, trainer.callbacks)  # type: ignore[attr-defined]
            note += f", saved in {path}; `fit --ckpt_path last{trust_option(run)}` resumes from it"
        # not `should_stop`: that would run an evaluation and change counters that were just saved
        # a launcher treats exit codes other than 0 as a failure, and kills all ranks
        stop = StoppedBySignal(128 + asked if trainer.is_global_zero else 0)
        stop.add_note(note)
        raise stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers, and print the path of the checkpoint."""
        self._restore_handlers()
        if isinstance(exception, StoppedBySignal) and trainer.is_global_zero:
            sys.stderr.write(exception.__notes__[0] + "\n")

    def _restore_handlers(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


def _checkpoint_folder(trainer: Trainer) -> Path:
    """Folder of the run's checkpoints."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return Path(folders[0]) if folders else run_folder(trainer) / "checkpoints"
