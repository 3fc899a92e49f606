"""Ends a fit that is asked to stop by a signal: at the end of an iteration, with a checkpoint that holds all of it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dqn.callbacks import data_of, run_folder

if TYPE_CHECKING:
    from lightning_dqn.distributed.sync import Sync

# what SLURM sends before it takes a job's machine away; there is none on Windows
REQUEUE = getattr(signal, "SIGUSR1", None)
# one Ctrl-C reaches a rank twice where the process that started it passes it on
ECHO_SECONDS = 2.0


class StoppedBySignal(SystemExit):
    """Ends the process with exit code 128 + signal and no traceback; Lightning closes what is open on its way."""


class StopOnSignal(Callback):
    """SIGTERM and SIGINT (Ctrl-C) end a fit when the iteration under way is complete, with exit code 143 or 130.

    The whole state is written to `last.ckpt`, among the other checkpoints of the run. A signal in an evaluation waits
    for its end, and for the next iteration's; a fit that has none ends as it would have. A second SIGINT ends the fit
    at once, as in Lightning, and saves nothing. Where Lightning requeues SLURM jobs by SIGUSR1, its checkpoint is made
    at the end of an iteration too. Fits in threads keep Lightning's own handling of signals: Python allows no other
    there. It stands last among the trainer's callbacks, so that all others have done their part of the iteration.

    What one of several ranks was asked, all hear at their next meeting, and stop at the end of that iteration.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._sync: Sync | None = None
        self._received_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which has just taken them."""
        self._sync = data_of(trainer).sync
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            # ignored is what a shell gives its background jobs
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._on_signal)
        if REQUEUE is not None and callable(signal.getsignal(REQUEUE)):
            self._before[REQUEUE] = signal.signal(REQUEUE, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal: it comes anywhere, and only between iterations is a state worth saving."""
        sync = self._sync
        assert sync is not None
        if signum == REQUEUE:
            sync.requeue_asked = True
        elif not sync.received_signal:
            sync.received_signal = signum
            self._received_at = time.monotonic()
            if signum == signal.SIGINT and sync.rank == 0:
                # past Python's buffers, in which the signal may have found us
                os.write(2, b"\nCtrl-C: saving when this iteration is complete; once more stops at once\n")
        elif signum == signal.SIGINT and (
            not sync.is_distributed or time.monotonic() - self._received_at > ECHO_SECONDS
        ):
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if that was asked.

        Not between an epoch's last iteration and its evaluation, which Lightning would leave out at a resume; nor when
        the next epoch starts, all of which it would leave out. The next iteration ends soon enough.
        """
        if any(self._asked()) and not trainer.is_last_batch:
            self._act(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if that was asked and no epoch has another iteration than its last."""
        if any(self._asked()) and trainer.num_training_batches == 1:
            self._act(trainer)

    def _asked(self) -> tuple[int, bool]:
        """The signal to stop by, or 0, and whether to be requeued; of several ranks, what all know of."""
        sync = self._sync
        assert sync is not None
        if not sync.is_distributed:
            return sync.received_signal, sync.requeue_asked
        return sync.agreed_signal, sync.requeue_agreed

    def _act(self, trainer: Trainer) -> None:
        """Do what was asked."""
        asked, requeue = self._asked()
        if requeue and REQUEUE in self._before:
            assert self._sync is not None
            self._sync.requeue_asked = self._sync.requeue_agreed = False
            self._before[REQUEUE](REQUEUE, None)
        if not asked:
            return
        name = signal.Signals(asked).name
        said = f"Stopped by {name} at {data_of(trainer).env_steps:,} env steps"
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = _checkpoint_folder(trainer) / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            said += f", all saved in {path}; `fit --ckpt_path last` goes on from there"
        # not `should_stop`: that would run an evaluation and move counters which were just saved
        # the first rank's says what happened; who started the others would take it for a failure, and kill all
        stop = StoppedBySignal(128 + asked if trainer.is_global_zero else 0)
        stop.add_note(said)
        raise stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and say in one line where the checkpoint lies."""
        self._restore_handlers()
        if isinstance(exception, StoppedBySignal) and trainer.is_global_zero:
            sys.stderr.write(exception.__notes__[0] + "\n")

    def _restore_handlers(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


def _checkpoint_folder(trainer: Trainer) -> Path:
    """Where the run's checkpoints lie."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return Path(folders[0]) if folders else run_folder(trainer) / "checkpoints"
