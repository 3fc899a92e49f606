"""Writes the return of each test episode."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ReturnsWriter(Callback):
    """Writes the returns of all test episodes, as a list in JSON.

    Args:
        path: path of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._returns: list[float] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Add one episode."""
        self._returns.append(float(batch.episode_return))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        Path(self.path).write_text(json.dumps(self._returns))
