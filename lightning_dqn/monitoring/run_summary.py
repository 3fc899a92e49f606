"""Prints a summary of a run: results, files and the command that evaluates the agent."""

import sys
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot
from lightning_dqn.resume.manifest import describe_run
from lightning_dqn.resume.rebuild import trust_option
from lightning_dqn.run import data_of, run_folder


class RunSummary(Callback):
    """Prints a short summary when a fit ends or is interrupted."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started_at = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        self._print(trainer, pl_module, "Finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print the summary of an interrupted run."""
        if trainer.state.fn == "fit" and isinstance(exception, KeyboardInterrupt):
            self._print(trainer, pl_module, "Stopped")

    def _print(self, trainer: Trainer, pl_module: LightningModule, outcome: str) -> None:
        if not trainer.is_global_zero:
            return
        data = data_of(trainer)
        minutes, seconds = divmod(round(time.monotonic() - self._started_at), 60)
        folder = run_folder(trainer)
        lines = [
            f"{outcome}: {data.env_steps:,} env steps, {trainer.global_step:,} updates in {minutes} min {seconds} s"
        ]
        returns = []
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c for c in checkpoints if c.monitor and c.best_model_score is not None), None)
        if best is not None:
            returns.append(f"best {float(best.best_model_score or 0):.1f}")
        if "val/episode_return" in trainer.callback_metrics:
            returns.append(f"last {float(trainer.callback_metrics['val/episode_return']):.1f}")
        if returns:
            lines.append(f"  return     {', '.join(returns)} (mean of {data.eval_episodes} greedy episodes)")
        saved = [c.best_model_path for c in checkpoints if c.best_model_path]
        lines += [f"  {'checkpoint' if not i else '':<10} {_short(path)}" for i, path in enumerate(saved)]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        plots = [folder / callback.filename for callback in callbacks if isinstance(callback, EpisodePlot)]
        videos = [path for callback in callbacks if isinstance(callback, AgentVideo) for path in callback.paths]
        lines += [f"  plot       {_short(path)}" for path in plots if path.exists()]
        lines += [f"  video      {_short(path)}" for path in videos]
        if saved and (folder / "config.yaml").exists():
            trust = trust_option(describe_run(pl_module, data, callbacks))
            if outcome == "Stopped":
                lines.append(f"  continue   python -m lightning_dqn fit --ckpt_path {_short(saved[-1])}{trust}")
            lines.append(f"  replay     python -m lightning_dqn test --ckpt_path {_short(saved[0])}{trust}")
        sys.stdout.write("\n".join(lines) + "\n")


def _short(path: str | Path) -> str:
    """The path relative to the working directory if it is below it."""
    absolute, here = Path(path).resolve(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
