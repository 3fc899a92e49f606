"""Callbacks that time runs of this package, and a model that times its training step."""

import math
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from benchmarks.marks import RateMarks, SolveRecord
from lightning_dqn import DQN
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.losses import TDLoss
from lightning_dqn.replay import AnyTransition


class TimedDQN(DQN):
    """A DQN that records when the updates of an iteration begin."""

    began: ClassVar[float] = 0.0

    def prepare_batch(self, batch: AnyTransition) -> AnyTransition:
        """As `DQN.prepare_batch`, which precedes the updates of an iteration."""
        # a class attribute, since Module.__setattr__ takes as long as the measured code
        TimedDQN.began = time.perf_counter()
        return super().prepare_batch(batch)


class RateClock(UpdateCallback):
    """Reads the counters after every iteration and ends the run when the time is over.

    Args:
        marks: receives the counters.
    """

    def __init__(self, marks: RateMarks) -> None:
        self.marks = marks
        self._seconds = 0.0

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Stop if the time is over."""
        if results and self.marks.running:
            self._seconds += time.perf_counter() - TimedDQN.began
        if self.marks.over(trainer.datamodule.env_steps, trainer.global_step):  # type: ignore[attr-defined]
            trainer.should_stop = True

    def seconds_in_updates(self) -> float:
        """Seconds that `TimedDQN` spent in updates between the marks."""
        return self._seconds


class SolveClock(UpdateCallback):
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

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
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
