"""Lets the agent explore less and less as env steps go by."""

import math
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dqn.callbacks.context import data_of, dqn
from lightning_dqn.resume.arguments import record_arguments


@record_arguments
class EpsilonDecay(Callback):
    """Sets the module's epsilon from the env-step clock, before the first step and after every iteration.

    It stays 0 where the module explores by itself, by a noisy network or by Boltzmann's chances.

    Args:
        start: epsilon at env step 0, in [0, 1].
        end: epsilon in the long run, in [0, 1].
        decay_env_steps: env steps in which the exponential falls to 1/e of its way, or the linear one to its end.
        schedule: exponential or linear.

    Raises:
        ValueError: if a value is out of its range.
    """

    # under which its arguments are in the manifest of a run
    manifest_section: ClassVar[str] = "epsilon"

    def __init__(
        self,
        *,
        start: float = 0.9,
        end: float = 0.05,
        decay_env_steps: int = 1000,
        schedule: Literal["exponential", "linear"] = "exponential",
    ) -> None:
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"epsilon.{name}={value}: must be in [0, 1]")
        if decay_env_steps < 1:
            raise ValueError(f"epsilon.decay_env_steps={decay_env_steps}: must be at least 1")
        if schedule not in ("exponential", "linear"):
            raise ValueError(f"epsilon.schedule={schedule}: must be exponential or linear")
        self.start = start
        self.end = end
        self.decay_env_steps = decay_env_steps
        self.schedule = schedule

    def epsilon_at(self, env_steps: int) -> float:
        """Epsilon after so many env steps."""
        passed = env_steps / self.decay_env_steps
        # exponential: what is left of the way is e^(-t/T); linear: 1 - t/T, down to nothing
        left = math.exp(-passed) if self.schedule == "exponential" else max(0.0, 1.0 - passed)
        return self.end + (self.start - self.end) * left

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning plays the first iteration before `on_train_batch_start`: epsilon is set here."""
        self._set(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Epsilon of the next iteration."""
        self._set(trainer, pl_module)

    def _set(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = dqn(pl_module)
        module.set_epsilon(0.0 if module.explores_by_itself else self.epsilon_at(data_of(trainer).env_steps))
