"""A progress bar of the whole run with the remaining time and the agent's returns."""

import importlib
import importlib.util
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_dqn.callbacks import data_of

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
            raise ValueError(f"refresh_seconds={refresh_seconds}: must be 0 or more")
        self.refresh_seconds = refresh_seconds if sys.stderr.isatty() else max(refresh_seconds, 10.0)
        self._enabled = True
        self._bar: Any = None
        # when updates were last counted, how many there were, and how fast they were then
        self._counted = (0.0, 0)
        self._rate = 0.0

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
        assert data.train_dataset is not None
        # a fit that resumes within an epoch does not call on_train_epoch_start
        self._counted = (time.monotonic(), trainer.global_step)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self._open("Training", epochs and epochs * data.train_dataset.epoch_env_steps, " env steps", data.env_steps)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the measurement of the speed, which excludes evaluations."""
        self._counted = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh every `refresh_seconds`."""
        if self._bar is not None and time.monotonic() - self._counted[0] >= self.refresh_seconds:
            self._count(trainer)
            self._refresh(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result of the evaluation; close the bar before Lightning prints why it stops."""
        if self._bar is None:
            return
        self._refresh(trainer, pl_module)
        epochs_done = 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        if trainer.should_stop or epochs_done or 0 <= trainer.max_steps <= trainer.global_step:
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar of episodes, unless the evaluation is part of a fit."""
        if trainer.state.fn == "fit":
            self._count(trainer)
        else:
            self._open("Validating", _own_episodes(trainer), " episodes")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of a test."""
        self._open("Testing", _own_episodes(trainer), " episodes")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of a prediction."""
        self._open("Predicting", _own_episodes(trainer), " episodes")

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
        """Close a bar of episodes."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            self._close()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
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

    def _count(self, trainer: Trainer) -> None:
        """Measure the speed of updates since they were last counted."""
        now = (time.monotonic(), trainer.global_step)
        if now[1] > self._counted[1]:
            self._rate = (now[1] - self._counted[1]) / (now[0] - self._counted[0])
        self._counted = now

    def _refresh(self, trainer: Trainer, pl_module: Any) -> None:
        data = data_of(trainer)
        recent = data.episodes.returns[-100:]
        shown = {
            "return": f"{sum(recent) / len(recent):.1f}" if recent else "-",
            "epsilon": f"{pl_module.read_epsilon():.3f}",
            "updates/s": f"{self._rate:.0f}",
        }
        if "val/episode_return" in trainer.callback_metrics:
            shown["val"] = f"{float(trainer.callback_metrics['val/episode_return']):.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.n = data.env_steps
        # env steps of an interrupted iteration are not in the total
        self._bar.total = self._bar.total and max(self._bar.total, data.env_steps)
        self._bar.refresh()


def _own_episodes(trainer: Trainer) -> int:
    """Episodes that this rank plays in an evaluation."""
    dataset = data_of(trainer).eval_dataset
    assert dataset is not None
    return len(dataset)
