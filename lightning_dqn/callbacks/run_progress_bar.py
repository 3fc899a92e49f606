"""Shows on one line how far the whole run is, how long it still takes, and how the agent does."""

import importlib
import importlib.util
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_dqn.callbacks.context import data_of, dqn

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class RunProgressBar(ProgressBar):
    """One bar for all epochs of a fit, in env steps; one in episodes for an evaluation.

    Args:
        refresh_seconds: between two refreshes, in s; where the output is no terminal, at least 10 s.

    Raises:
        ValueError: if refresh_seconds is negative.
    """

    def __init__(self, *, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        if refresh_seconds < 0:
            raise ValueError(f"progress_bar.refresh_seconds={refresh_seconds}: must be 0 or more")
        self.refresh_seconds = refresh_seconds if sys.stderr.isatty() else max(refresh_seconds, 10.0)
        self._enabled = True
        self._bar: Any = None
        self._shown = (0.0, 0)

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.write(" ".join(map(str, args)))
        elif self._enabled:
            sys.stderr.write(" ".join(map(str, args)) + "\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of the run."""
        data = data_of(trainer)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self._open("Training", epochs and epochs * data.steps_in_epoch, " env steps", data.env_steps)
        self._shown = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh now and then."""
        if self._bar is not None and time.monotonic() - self._shown[0] >= self.refresh_seconds:
            self._refresh(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the evaluation said."""
        if self._bar is not None:
            self._refresh(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it stands."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar as it stands."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within a fit the bar of the run goes on; alone, evaluation has its own."""
        if self._bar is None:
            self._open("Validating", data_of(trainer).eval_episodes, " episodes")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of a test."""
        self._open("Testing", data_of(trainer).eval_episodes, " episodes")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of a prediction."""
        self._open("Predicting", data_of(trainer).eval_episodes, " episodes")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """One episode more, if they are what is counted."""
        if trainer.state.fn == "validate" and self._bar is not None:
            self._bar.update(1)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """One episode more."""
        if self._bar is not None:
            self._bar.update(1)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """One episode more."""
        if self._bar is not None:
            self._bar.update(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a bar of episodes as it stands."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            self._close()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it stands."""
        self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it stands."""
        self._close()

    def _open(self, description: str, total: int | None, unit: str, initial: int = 0) -> None:
        if not self._enabled:
            return
        # tqdm warns in notebooks that lack ipywidgets
        tqdm = importlib.import_module("tqdm.auto" if importlib.util.find_spec("ipywidgets") else "tqdm").tqdm
        layout = FORMAT.replace("{total_fmt}", "{total_fmt}" + unit) if total else None
        self._bar = tqdm(
            desc=description, total=total, initial=initial, unit=unit, bar_format=layout, dynamic_ncols=True
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        now, updates = time.monotonic(), trainer.global_step
        recent = data.episodes.returns[-100:]
        shown = {
            "return": f"{sum(recent) / len(recent):.1f}" if recent else "-",
            "epsilon": f"{float(dqn(pl_module).epsilon):.3f}",
            "updates/s": f"{(updates - self._shown[1]) / max(now - self._shown[0], 1e-9):.0f}",
        }
        if "val/episode_return" in trainer.callback_metrics:
            shown["val"] = f"{float(trainer.callback_metrics['val/episode_return']):.1f}"
        self._shown = (now, updates)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.n = data.env_steps
        # an interrupted iteration was played, but did not count
        self._bar.total = self._bar.total and max(self._bar.total, data.env_steps)
        self._bar.refresh()
