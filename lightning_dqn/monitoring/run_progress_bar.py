"""A progress bar of the whole run with the remaining time and the agent's returns."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_dqn.run import data_of


class RunProgressBar(TQDMProgressBar):
    """One bar in env steps for all epochs of a fit; one in episodes for an evaluation.

    Args:
        refresh_seconds: time between two refreshes in s; at least 10 s if the output is not a terminal.

    Raises:
        ValueError: if refresh_seconds is negative.
    """

    def __init__(self, *, refresh_seconds: float = 0.5) -> None:
        if refresh_seconds < 0:
            raise ValueError(f"refresh_seconds={refresh_seconds}: must be 0 or more")
        terminal = sys.stderr.isatty()
        # the rate is that of evaluations, in episodes
        super().__init__(refresh_rate=1 if terminal else 10)
        self.refresh_seconds = refresh_seconds if terminal else max(refresh_seconds, 10.0)
        self._bar: Tqdm | None = None
        # time and updates at the last refresh, and the updates per second before it
        self._counted = (0.0, 0)
        self._rate = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """The bar of a fit, in env steps."""
        data, epochs = data_of(self.trainer), self.trainer.max_epochs or 0
        total = epochs * data.train_dataset.epoch_env_steps if epochs > 0 else None
        return self._open("Training", total, "env steps", data.env_steps)

    def init_sanity_tqdm(self) -> Tqdm:
        """A disabled bar: the sanity check has none."""
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of `Trainer.validate`; a disabled one during a fit."""
        return Tqdm(disable=True) if self.trainer.state.fn == "fit" else self._open_episodes("Validating")

    def init_test_tqdm(self) -> Tqdm:
        """The bar of a test, in episodes."""
        return self._open_episodes("Testing")

    def init_predict_tqdm(self) -> Tqdm:
        """The bar of a prediction, in episodes."""
        return self._open_episodes("Predicting")

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """False, since there is one data loader: bars keep their description and total."""
        return False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar; a fit that resumes within an epoch does not call on_train_epoch_start."""
        self.on_train_epoch_start(trainer)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Restart the measurement of the speed, which excludes evaluations."""
        self._counted = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Refresh every `refresh_seconds`."""
        if time.monotonic() - self._counted[0] >= self.refresh_seconds:
            self._refresh(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh before an evaluation, which the speed excludes."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._refresh(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result of the evaluation; close the bar before Lightning prints why training stops."""
        self._refresh(trainer, pl_module)
        epochs_done = 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        if trainer.should_stop or epochs_done or 0 <= trainer.max_steps <= trainer.global_step:
            self.train_progress_bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, int | str | float | dict[str, float]]:
        """The values to the right of the bar of a fit."""
        recent = data_of(trainer).episodes.returns[-100:]
        shown: dict[str, int | str | float | dict[str, float]] = {
            "return": f"{sum(recent) / len(recent):.1f}" if recent else "-",
            "epsilon": f"{pl_module.read_epsilon():.3f}",
            "updates/s": f"{self._rate:.0f}",
        }
        if "val/episode_return" in trainer.callback_metrics:
            shown["val"] = f"{float(trainer.callback_metrics['val/episode_return']):.1f}"
        return shown

    def _open(self, description: str, total: int | None, unit: str, initial: int = 0) -> Tqdm:
        counts = f"{{n_fmt}}/{{total_fmt}} {unit}" if total else f"{{n_fmt}} {unit}"
        self._bar = Tqdm(
            desc=description,
            total=total,
            initial=initial,
            disable=self.is_disabled,
            dynamic_ncols=True,
            bar_format=f"{{l_bar}}{{bar}}| {counts} [{{elapsed}}<{{remaining}}{{postfix}}]",
        )
        return self._bar

    def _open_episodes(self, description: str) -> Tqdm:
        return self._open(description, len(data_of(self.trainer).eval_dataset), "episodes")

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_disabled:
            return
        (then, before), (now, updates) = self._counted, (time.monotonic(), trainer.global_step)
        if updates > before:
            self._rate = (updates - before) / (now - then)
        self._counted = now, updates
        bar, env_steps = self.train_progress_bar, data_of(trainer).env_steps
        bar.n = env_steps
        # the total excludes the env steps of an interrupted iteration
        bar.total = bar.total and max(bar.total, env_steps)
        bar.set_postfix(self.get_metrics(trainer, pl_module))
