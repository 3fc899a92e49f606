"""Callbacks that time this package's runs from inside Lightning's loop, and the learner that times its own step."""

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
    """The learner, with the time inside its training step added up, to tell it from all that is around it."""

    seconds_in_step: ClassVar[float] = 0.0

    def training_step(self, batch: Transition, batch_idx: int) -> dict[str, Tensor] | None:
        """As `DQN.training_step`."""
        start = time.perf_counter()
        outputs = super().training_step(batch, batch_idx)
        # an attribute of the class: Module.__setattr__ would cost as much as what is measured
        TimedDQN.seconds_in_step += time.perf_counter() - start
        return outputs


class RateClock(Callback):
    """Takes the counters after every iteration and ends the run when the time is over.

    Args:
        marks: where the counters go.
    """

    def __init__(self, marks: RateMarks) -> None:
        self.marks = marks
        self._in_step_before: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if it is time."""
        if self.marks.over(trainer.datamodule.env_steps, trainer.global_step):  # type: ignore[attr-defined]
            trainer.should_stop = True
        elif self._in_step_before is None and self.marks.running:
            self._in_step_before = TimedDQN.seconds_in_step

    def seconds_in_step(self) -> float:
        """Seconds that `TimedDQN` spent in its training step between the marks."""
        return TimedDQN.seconds_in_step - (self._in_step_before or 0.0)


class SolveClock(Callback):
    """Evaluates between iterations, with the clock of training stopped; so it is for Lightning's own evaluations.

    Args:
        record: where the evaluations go.
        max_env_steps: after which the run ends; 0 leaves that to the settings, or to three good evaluations in a row.
    """

    def __init__(self, record: SolveRecord, max_env_steps: int) -> None:
        self.record = record
        self.max_env_steps = max_env_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The clock runs from about the first thing that `fit` does.

        A stopping rule of the settings' own would hide whether the solution holds: it goes.
        """
        self.record.start()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [each for each in callbacks if not isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate, if it is time, and end the run at its length."""
        env_steps = trainer.datamodule.env_steps  # type: ignore[attr-defined]
        self.record.visit(env_steps, pl_module.act)  # type: ignore[arg-type]
        long_enough = env_steps >= self.max_env_steps if self.max_env_steps else self.record.solved(3)[0] < math.inf
        if long_enough:
            trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluation is no training."""
        self.record.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        self.record.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock before anything is torn down."""
        self.record.stop(trainer.datamodule.env_steps)  # type: ignore[attr-defined]


class ConfigSolveClock(SolveClock):
    """The same for runs made by the command line, which can name a class but hand over no object.

    Args:
        seed: of the evaluation episodes.
        every: env steps from one evaluation to the next.
    """

    made: ClassVar["ConfigSolveClock"]

    def __init__(self, *, seed: int, every: int) -> None:
        super().__init__(SolveRecord(seed, every), 0)
        ConfigSolveClock.made = self
