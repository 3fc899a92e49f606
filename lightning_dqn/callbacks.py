"""Callbacks for target updates, epsilon schedules and the priorities of prioritized replay.

Legend: U updates, B batch.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dqn.losses import TDLoss
from lightning_dqn.resume.arguments import record_arguments
from lightning_dqn.run import data_of


class UpdateCallback(Callback):
    """A callback that also runs after each update and after each iteration.

    Attributes:
        updates_target: whether it updates `target_net`; if no callback does, a default `SoftTargetUpdate` is added.
    """

    updates_target: ClassVar[bool] = False

    def on_update_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Called by `DQN.update` after the optimizer step and the learning-rate schedule."""

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Called by `DQN.training_step` after the updates of an iteration, before the next env steps.

        Args:
            trainer: of the fit.
            pl_module: the `DQN`.
            batch: of the iteration, of leading shape (U, B).
            results: losses of its U updates; empty during the warm-up.
        """


@record_arguments
class EpsilonSchedule(UpdateCallback):
    """Sets the module's epsilon from the env-step clock: before the first env step and after each iteration.

    Subclasses define `epsilon_at`. Epsilon is 0 where the module explores without it: with noisy networks or Boltzmann
    exploration.
    """

    # prefix of its arguments in the manifest and on the command line
    manifest_section: ClassVar[str] = "epsilon"

    def epsilon_at(self, env_steps: int) -> float:
        """Return epsilon in [0, 1] after `env_steps` env steps."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the epsilon of the first iteration."""
        self._set(trainer, pl_module)

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Set the epsilon of the next iteration."""
        self._set(trainer, pl_module)

    def _set(self, trainer: Trainer, pl_module: Any) -> None:
        epsilon = 0.0 if pl_module.explores_without_epsilon else self.epsilon_at(data_of(trainer).env_steps)
        pl_module.set_epsilon(epsilon)


class EpsilonDecay(EpsilonSchedule):
    """Decays epsilon from `start` to `end` over the env steps of all ranks.

    Args:
        start: epsilon at env step 0, in [0, 1].
        end: final epsilon, in [0, 1].
        decay_env_steps: time constant of the exponential schedule, or duration of the linear one, in env steps.
        schedule: exponential or linear.

    Raises:
        ValueError: if a value is out of its range.
    """

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
                raise ValueError(f"{name}={value}: must be in [0, 1]")
        if decay_env_steps < 1:
            raise ValueError(f"decay_env_steps={decay_env_steps}: must be at least 1")
        if schedule not in ("exponential", "linear"):
            raise ValueError(f"schedule={schedule}: must be exponential or linear")
        self.start = start
        self.end = end
        self.decay_env_steps = decay_env_steps
        self.schedule = schedule

    def epsilon_at(self, env_steps: int) -> float:
        """Return epsilon in [0, 1] after `env_steps` env steps."""
        passed = env_steps / self.decay_env_steps
        # exponential: end + (start - end) e^(-t/T); linear: end + (start - end) max(0, 1 - t/T)
        remaining = math.exp(-passed) if self.schedule == "exponential" else max(0.0, 1.0 - passed)
        return self.end + (self.start - self.end) * remaining


@record_arguments
class SoftTargetUpdate(UpdateCallback):
    """Updates the target net: target <- (1 - tau) * target + tau * policy (Lillicrap et al. 2016).

    With `every_n_updates` this happens directly after the optimizer step. With `every_n_env_steps` it happens after the
    updates of the iteration in which the env-step clock passes the next multiple.

    Args:
        tau: weight of the policy net, in (0, 1]; 1 copies it (Mnih et al. 2015).
        every_n_updates: period in updates.
        every_n_env_steps: period in env steps, in place of updates; null uses `every_n_updates`.

    Raises:
        ValueError: if a value is out of its range, or both clocks are given.
    """

    # prefix of its arguments in the manifest and on the command line
    manifest_section: ClassVar[str] = "target_update"
    updates_target: ClassVar[bool] = True

    def __init__(self, *, tau: float = 0.005, every_n_updates: int = 1, every_n_env_steps: int | None = None) -> None:
        if not 0 < tau <= 1:
            raise ValueError(f"tau={tau}: must be in (0, 1]; 1 copies the whole policy net")
        if every_n_updates < 1:
            raise ValueError(f"every_n_updates={every_n_updates}: must be at least 1")
        if every_n_env_steps is not None and every_n_env_steps < 1:
            raise ValueError(f"every_n_env_steps={every_n_env_steps}: must be at least 1, or None")
        if every_n_env_steps is not None and every_n_updates != 1:
            raise ValueError(
                f"every_n_updates={every_n_updates}, every_n_env_steps={every_n_env_steps}: two clocks; "
                "leave one of them out"
            )
        self.tau = tau
        self.every_n_updates = every_n_updates
        self.every_n_env_steps = every_n_env_steps
        self._periods = 0

    def on_update_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Update the target net if the period is in updates."""
        if self.every_n_env_steps is None and trainer.global_step % self.every_n_updates == 0:
            pl_module.update_target(self.tau)

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Update the target net if the period is in env steps."""
        if self.every_n_env_steps is None:
            return
        periods = data_of(trainer).env_steps // self.every_n_env_steps
        # also different, but smaller, if a resumed run has a longer period
        if periods != self._periods:
            self._periods = periods
            pl_module.update_target(self.tau)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of periods of env steps that have passed."""
        return {"periods": self._periods}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._periods = state_dict["periods"]


@record_arguments
class PriorityUpdate(UpdateCallback):
    """Writes new priorities to a prioritized sampler and anneals its beta (Schaul et al. 2016).

    Both happen after each iteration, before the next env steps and draws. With other samplers it does nothing.

    Args:
        beta_start: exponent of the importance weights at env step 0, in [0, 1].
        beta_end: final exponent, in [0, 1].
        anneal_env_steps: duration of the linear change from `beta_start` to `beta_end`, in env steps.

    Raises:
        ValueError: if a value is out of its range.
    """

    # prefix of its arguments in the manifest and on the command line
    manifest_section: ClassVar[str] = "priorities"

    def __init__(self, *, beta_start: float = 0.4, beta_end: float = 1.0, anneal_env_steps: int = 100_000) -> None:
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be in [0, 1]")
        if anneal_env_steps < 1:
            raise ValueError(f"anneal_env_steps={anneal_env_steps}: must be at least 1")
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.anneal_env_steps = anneal_env_steps
        self._sampler: Any = None

    def beta_at(self, env_steps: int) -> float:
        """Return beta in [0, 1] after `env_steps` env steps."""
        passed = min(1.0, env_steps / self.anneal_env_steps)
        return self.beta_start + (self.beta_end - self.beta_start) * passed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get the sampler and set the beta of the first draw."""
        # a dataset of rollouts has no memory
        memory: Any = data_of(trainer).train_dataset.memory
        self._sampler = memory.sampler if memory is not None and memory.sampler.uses_priorities else None
        self._set_beta(trainer)

    def on_iteration_end(self, trainer: Trainer, pl_module: Any, batch: Any, results: Sequence[TDLoss]) -> None:
        """Write the priorities (U, B) of this iteration, if it had an update, and set the beta of the next."""
        if self._sampler is None:
            return
        if results:
            priority = torch.cat([each.priority for each in results]).to("cpu", torch.float32)
            self._sampler.update_priorities(batch.index.cpu().numpy().ravel(), priority.numpy())
        self._set_beta(trainer)

    def _set_beta(self, trainer: Trainer) -> None:
        if self._sampler is not None:
            self._sampler.beta = self.beta_at(data_of(trainer).env_steps)
