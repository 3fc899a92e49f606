"""The callback that ends a run at its first update, for processes timed from their start."""

import sys
import time
from typing import ClassVar

import lightning.pytorch as pl

from lightning_dqn.callbacks import UpdateCallback


class FirstUpdateClock(UpdateCallback):
    """Notes when the first update is done, in seconds since the epoch, and ends the run."""

    done_at: ClassVar[float] = 0.0
    modules: ClassVar[frozenset[str]] = frozenset()

    def on_update_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the first update."""
        if not trainer.should_stop:
            FirstUpdateClock.done_at = time.time()
            FirstUpdateClock.modules = frozenset(sys.modules)
            trainer.should_stop = True
