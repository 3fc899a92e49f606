"""A callback that ends a run after its first update, for measurements of the startup time."""

import sys
import time
from typing import ClassVar

import lightning.pytorch as pl

from lightning_dqn.callbacks import UpdateCallback


class FirstUpdateClock(UpdateCallback):
    """Records the time of the first update, in seconds since the Unix epoch, and ends the run."""

    done_at: ClassVar[float] = 0.0
    modules: ClassVar[frozenset[str]] = frozenset()

    def on_update_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the first update."""
        if not trainer.should_stop:
            FirstUpdateClock.done_at = time.time()
            FirstUpdateClock.modules = frozenset(sys.modules)
            trainer.should_stop = True
