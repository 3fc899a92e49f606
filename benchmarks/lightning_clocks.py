"""Callbacks that time runs of this package, and a model that times its training step."""

import math
import time
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from benchmarks.marks import RateMarks, SolveRecord
from lightning_dqn import DQN
from lightning_dqn.replay import Transition


class TimedDQN(DQN):
    """A DQN that sums the time in its training step."""

    seconds_in_step: ClassVar[float] = 0.0

    def training_step(self, batch: Transition, batch_idx: int) -> dict[str, Tensor] | None:
        """As `DQN.training_step`."""
        start = time.perf_counter()
        outputs = super().training_step(batch, batch_idx)
        # a class attribute, since Module.__setattr__ takes as long as the measured code
        TimedDQN.seconds_in_step += time.perf_counter() - start
        return outputs


class RateClock(Callback):
    """Reads the counters after every iteration and ends the run when the time is over.

    Args:
        marks: receives the counters.
    """

    def __init__(self, marks: RateMarks) -> None:
        self.marks = marks
        self._in_step_before: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if the time is over."""
        if self.marks.over(trainer.datamodule.env_steps, trainer.global_step):  # type: ignore[attr-defined]
            trainer.should_stop = True
        elif self._in_step_before is None and self.marks.running:
            self._in_step_before = TimedDQN.seconds_in_step

    def seconds_in_step(self) -> float:
        """Seconds in the training step of `TimedDQN` between the marks."""
        return TimedDQN.seconds_in_step - (self._in_step_before or 0.0)


class SolveClock(Callback):
    """Evaluates between iterations; training time excludes these and Lightning's evaluations.

    Args:
        record: receives the evaluations.
        max_env_steps: end of the run; with 0 it ends by its settings, or after three consecutive good evaluations.
    """

    def __init__(self, record: SolveRecord, max_env_steps: int) -> None:
        self.record = record
        self.max_env_steps = max_env_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock at the beginning of `fit`.

        Removes early stopping, which would hide whether the solution is stable.
        """
        self.record.start()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [each for each in callbacks if not isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if due, and end the run at its length."""
        env_steps = trainer.datamodule.env_steps  # type: ignore[attr-defined]
        self.record.visit(env_steps, pl_module.act)  # type: ignore[arg-type]
        long_enough = env_steps >= self.max_env_steps if self.max_env_steps else self.record.solved(3)[0] < math.inf
        if long_enough:
            trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.record.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the clock."""
        self.record.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock before teardown."""
        self.record.stop(trainer.datamodule.env_steps)  # type: ignore[attr-defined]


class ConfigSolveClock(SolveClock):
    """`SolveClock` for the command line, with plain values as arguments.

    Args:
        seed: seed of the evaluation episodes.
        every: env steps between two evaluations.
    """

    made: ClassVar["ConfigSolveClock"]

    def __init__(self, *, seed: int, every: int) -> None:
        super().__init__(SolveRecord(seed, every), 0)
        ConfigSolveClock.made = self
