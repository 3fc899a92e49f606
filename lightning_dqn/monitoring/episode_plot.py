"""Plots the durations of training episodes: a PNG file, a live image in notebooks, and an image in W&B."""

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_dqn.run import data_of, run_folder


class EpisodePlot(Callback):
    """Plots the duration of each training episode and its running mean.

    Args:
        filename: name of the file in the folder of the run.
        window: episodes in the running mean.
        min_seconds: minimum time between two plots during training, in s.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, *, filename: str = "episodes.png", window: int = 100, min_seconds: float = 5.0) -> None:
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1 episode")
        if min_seconds < 0:
            raise ValueError(f"min_seconds={min_seconds}: must be 0 or more")
        self.filename = filename
        self.window = window
        self.min_seconds = min_seconds
        self._drawn_at = 0.0
        self._display: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait `min_seconds` before the first plot."""
        self._drawn_at = time.monotonic()
        self._display = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Plot every `min_seconds`."""
        if time.monotonic() - self._drawn_at >= self.min_seconds and trainer.is_global_zero:
            self._draw(trainer, "Training...")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot, and log the image."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            self._log(trainer, self._draw(trainer, "Training..."))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot the result, and log it."""
        if trainer.is_global_zero:
            self._log(trainer, self._draw(trainer, "Result"))

    def _draw(self, trainer: Trainer, title: str) -> Path:
        path = run_folder(trainer) / self.filename
        # other processes must not read an incomplete file
        unfinished = path.with_name(f".{path.name}")
        durations_figure(data_of(trainer).episodes.lengths, self.window, title).savefig(
            unfinished, format="png", dpi=100
        )
        os.replace(unfinished, path)
        if _in_notebook():
            self._show(path)
        self._drawn_at = time.monotonic()
        return path

    def _show(self, path: Path) -> None:
        ipython: Any = importlib.import_module("IPython.display")
        image = ipython.Image(filename=str(path))
        if self._display is None:
            self._display = ipython.display(image, display_id=True)
        else:
            self._display.update(image)

    def _log(self, trainer: Trainer, path: Path) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("episodes", [str(path)])


def durations_figure(durations: list[int], window: int, title: str) -> Any:
    """A matplotlib figure of episode durations, in env steps, over episodes, and of their running mean.

    Args:
        durations: durations of all episodes, oldest first.
        window: episodes in the running mean, which starts with the first full window.
        title: title of the axes.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  the import takes half a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="Episode", ylabel="Duration (env steps)")
    episodes = np.arange(1, len(durations) + 1)
    axes.plot(episodes, durations, color="tab:blue", alpha=0.45, linewidth=0.8, label="episode")
    if len(durations) >= window:
        total = np.cumsum([0, *durations])
        means = (total[window:] - total[:-window]) / window
        axes.plot(episodes[window - 1 :], means, color="tab:orange", linewidth=2, label=f"mean of {window}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def _in_notebook() -> bool:
    """Whether the code runs in an IPython kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
