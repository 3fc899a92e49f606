"""Writes what a test has played: one number an episode."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ReturnsWriter(Callback):
    """Writes the returns of all test episodes, as a list in JSON.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._returns: list[float] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Keep one episode."""
        self._returns.append(float(batch.episode_return))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them."""
        Path(self.path).write_text(json.dumps(self._returns))
