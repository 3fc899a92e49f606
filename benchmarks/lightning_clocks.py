"""Callbacks that time this package's runs from inside Lightning's loop, and the learner that times its own step."""

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
    """The module, with the time at which the updates of an iteration began, to tell them from all that is around."""

    began: ClassVar[float] = 0.0

    def prepare_batch(self, batch: AnyTransition) -> AnyTransition:
        """As `DQN.prepare_batch`, with which the updates of an iteration begin."""
        # an attribute of the class: Module.__setattr__ would cost as much as what is measured
        TimedDQN.began = time.perf_counter()
        return super().prepare_batch(batch)


class RateClock(UpdateCallback):
    """Takes the counters after every iteration and ends the run when the time is over.

    Args:
        marks: where the counters go.
    """

    def __init__(self, marks: RateMarks) -> None:
        self.marks = marks
        self._seconds = 0.0

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Stop, if it is time."""
        if results and self.marks.running:
            self._seconds += time.perf_counter() - TimedDQN.began
        if self.marks.over(trainer.datamodule.env_steps, trainer.global_step):  # type: ignore[attr-defined]
            trainer.should_stop = True

    def seconds_in_updates(self) -> float:
        """Seconds that `TimedDQN` spent in updates between the marks."""
        return self._seconds


class SolveClock(UpdateCallback):
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

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
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
