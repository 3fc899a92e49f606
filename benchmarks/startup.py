"""Processes timed from their start: this package's command line, and one that only imports what such a run needs.

Imports little at the top, so that the times are those of the packages.
"""

import sys
import time
from typing import Any, ClassVar

import lightning.pytorch as pl

from benchmarks.settings import ENV_ID, Job, Result


class FirstUpdateClock(pl.Callback):
    """Notes when the first update is done, in seconds since the epoch, and ends the run."""

    done_at: ClassVar[float] = 0.0
    modules: ClassVar[frozenset[str]] = frozenset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the first iteration that learnt."""
        if trainer.global_step and not trainer.should_stop:
            FirstUpdateClock.done_at = time.time()
            FirstUpdateClock.modules = frozenset(sys.modules)
            trainer.should_stop = True


def ours(job: Job) -> Result:
    """Seconds from the start of the process to the end of the first update of a plain `python -m lightning_dqn fit`."""
    from lightning_dqn.cli import main  # noqa: PLC0415  # as `python -m lightning_dqn` does, and not before it

    words = ["fit", "--trainer.default_root_dir", job.scratch, "--data.eval_episodes", "1"]
    words += [f"--trainer.callbacks+={__name__}.{FirstUpdateClock.__name__}"]
    if has_compile_argument():
        words += ["--model.compile", "false"]
    main(words)
    return {
        "figures": {"startup_s": FirstUpdateClock.done_at - job.launched_at},
        "notes": {"packages": _packages(FirstUpdateClock.modules)},
    }


def bare(job: Job) -> Result:
    """Seconds from the start of the process until torch, Lightning and Gymnasium are imported and there is a game."""
    import gymnasium as gym  # noqa: PLC0415  # imported when its time has come
    import torch  # noqa: F401, PLC0415  # Lightning has brought it along

    gym.make(ENV_ID)
    return {"figures": {"startup_s": time.time() - job.launched_at}, "notes": {"packages": _packages(sys.modules)}}


def has_compile_argument() -> bool:
    """Whether this version of the package can compile its update."""
    import inspect  # noqa: PLC0415

    from lightning_dqn import DQN  # noqa: PLC0415  # too early at the top

    return "compile" in inspect.signature(DQN).parameters


def _packages(modules: Any) -> list[str]:
    """Installed packages among module names."""
    names = {name.partition(".")[0] for name in modules}
    return sorted(name for name in names if name not in sys.stdlib_module_names and not name.startswith("_"))
