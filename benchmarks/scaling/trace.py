"""Records the collective calls of a rank, with their bytes and times, by iteration."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import distributed

from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.losses import TDLoss

# index of the argument that a rank sends
COLLECTIVES = {"all_reduce": 0, "all_gather": 1, "broadcast": 0}
# events that are not calls: the batch of an iteration, the end of an update
BATCH, UPDATE = "batch", "update"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """I iterations of a rank with the same E events each, the last of which ends the iteration.

    Attributes:
        events: name and bytes of each; bytes are 0 for events that are not calls.
        begun: (I,) start times in s, on a clock shared by all processes of the machine.
        entered: (I, E) entry times in s.
        left: (I, E) return times in s.
    """

    events: list[tuple[str, int]]
    begun: Floats
    entered: Floats
    left: Floats

    @property
    def gaps(self) -> Floats:
        """(I, E) compute times in s before each event."""
        return self.entered - np.column_stack([self.begun, self.left[:, :-1]])

    @property
    def iteration_s(self) -> float:
        """Mean seconds of an iteration."""
        return float((self.left[:, -1] - self.begun).mean())

    @property
    def updates(self) -> int:
        """Number of updates in an iteration."""
        return sum(name == UPDATE for name, _ in self.events)

    def latencies(self) -> Floats:
        """(I x U,) seconds from the end of an update, or from the batch, to the end of the next one."""
        last, found = self.begun, []
        for event, (name, _) in enumerate(self.events):
            if name == UPDATE:
                found.append(self.entered[:, event] - last)
            if name in (BATCH, UPDATE):
                last = self.entered[:, event]
        return np.concatenate(found)

    def as_json(self) -> dict[str, Any]:
        """The trace as lists and numbers."""
        times = {"begun": self.begun, "entered": self.entered, "left": self.left}
        return {"events": self.events, **{name: array.tolist() for name, array in times.items()}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Trace":
        """A trace from `as_json`."""
        events = [(name, size) for name, size in content["events"]]
        return cls(events, *(np.array(content[name]) for name in ("begun", "entered", "left")))


class Recorder:
    """Records all collective calls of this process, and marks between them, while it is active."""

    def __init__(self) -> None:
        self.running = False
        self._events: list[tuple[str, int, float, float]] = []

    def listen(self) -> None:
        """Wrap the functions of torch.distributed."""
        for name, place in COLLECTIVES.items():
            setattr(distributed, name, self._timed(name, place, getattr(distributed, name)))

    def mark(self, name: str) -> None:
        """Record an event that is not a call."""
        if self.running:
            now = time.perf_counter()
            self._events.append((name, 0, now, now))

    def trace(self) -> Trace:
        """All complete iterations: between synchronizations of env steps, or between batches for a single rank.

        Raises:
            RuntimeError: if their events differ.
        """
        last = "all_gather" if any(event[0] == "all_gather" for event in self._events) else BATCH
        ends = [i for i, event in enumerate(self._events) if event[0] == last]
        rows = [self._events[a + 1 : b + 1] for a, b in itertools.pairwise(ends)]
        kinds = {tuple(event[:2] for event in row) for row in rows}
        if len(kinds) != 1:
            raise RuntimeError(f"iterations made different calls: {kinds}")
        times = np.array([[event[2:] for event in row] for row in rows])
        begun = np.array([self._events[end][3] for end in ends[:-1]])
        return Trace(list(kinds.pop()), begun, times[..., 0], times[..., 1])

    def _timed(self, name: str, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return call(*args, **kwargs)
            entered = time.perf_counter()
            answer = call(*args, **kwargs)
            self._events.append((name, args[place].nbytes, entered, time.perf_counter()))
            return answer

        return timed


class TraceClock(UpdateCallback):
    """Activates a recorder for some iterations, then ends the fit; must be the last callback.

    Args:
        recorder: also receives marks of batches and updates.
        skipped: iterations with updates before the recording.
        measured: recorded iterations.
    """

    def __init__(self, recorder: Recorder, skipped: int, measured: int) -> None:
        self._recorder, self._first, self._last = recorder, skipped, skipped + measured
        self._iterations = 0
        self._env_steps = 0
        self.env_steps = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Mark each batch before its updates."""
        prepare = pl_module.prepare_batch

        def prepare_batch(batch: Any) -> Any:
            self._recorder.mark(BATCH)
            return prepare(batch)

        pl_module.prepare_batch = prepare_batch

    def on_update_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the end of an update and its target update."""
        self._recorder.mark(UPDATE)

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Start or end the recording if due; `env_steps` is then set to those of an iteration of all ranks."""
        self._iterations += trainer.global_step > 0
        env_steps = trainer.datamodule.env_steps  # type: ignore[attr-defined]
        if self._iterations == self._first:
            self._recorder.running = True
            self._env_steps = env_steps
        elif self._iterations == self._last:
            self._recorder.running = False
            self.env_steps = (env_steps - self._env_steps) / (self._last - self._first)
            trainer.should_stop = True
