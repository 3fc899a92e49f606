"""Takes TD errors back to the memory, whose prioritised sampler learns from them (Schaul et al. 2016).

The one arrow from the module to the data side.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dqn.resume.arguments import record_arguments

if TYPE_CHECKING:
    from lightning_dqn.data import DQNDataModule
    from lightning_dqn.module import DQN
    from lightning_dqn.sampling.prioritized import PrioritizedSampler


def run_folder(trainer: Trainer) -> Path:
    """The trainer's `default_root_dir` where one was given, else the logger's folder of this run; made if need be.

    Any rank may ask alone, which `Trainer.log_dir` does not allow: it waits for all.
    """
    folder = Path(trainer.default_root_dir)
    if folder.resolve() == Path.cwd():
        logger = trainer.logger
        folder = Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or folder)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_of(trainer: Trainer) -> "DQNDataModule":
    """The data module of the run.

    Raises:
        MisconfigurationException: if loaders were given without one.
    """
    datamodule: DQNDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None:
        raise MisconfigurationException("There is no env-step clock: call trainer.fit(model, datamodule=...)")
    return datamodule


def dqn(pl_module: LightningModule) -> "DQN":
    """The learner, as its own type."""
    learner: DQN = pl_module  # type: ignore[assignment]
    return learner


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
        module.set_epsilon(0.0 if module.explores_without_epsilon else self.epsilon_at(data_of(trainer).env_steps))


@record_arguments
class SoftTargetUpdate(Callback):
    """target_net <- (1 - tau) target_net + tau policy_net, every k updates (Lillicrap et al. 2016) or env steps.

    By updates it happens inside the training step, right behind the optimizer; by env steps, behind the updates of the
    iteration in which the clock has passed another multiple of k. Checkpoints never fall between.

    Args:
        tau: share of the way, in (0, 1]; 1 copies the policy net (Mnih et al. 2015).
        every_n_updates: updates from one move to the next.
        every_n_env_steps: env steps from one move to the next, in place of updates; null for updates.

    Raises:
        ValueError: if a value is out of its range, or both clocks are given.
    """

    # under which its arguments are in the manifest of a run
    manifest_section: ClassVar[str] = "target_update"

    def __init__(self, *, tau: float = 0.005, every_n_updates: int = 1, every_n_env_steps: int | None = None) -> None:
        if not 0 < tau <= 1:
            raise ValueError(f"target_update.tau={tau}: must be in (0, 1]; 1 copies the whole policy net")
        if every_n_updates < 1:
            raise ValueError(f"target_update.every_n_updates={every_n_updates}: must be at least 1")
        if every_n_env_steps is not None and every_n_env_steps < 1:
            raise ValueError(f"target_update.every_n_env_steps={every_n_env_steps}: must be at least 1, or null")
        if every_n_env_steps is not None and every_n_updates != 1:
            raise ValueError(
                f"target_update.every_n_updates={every_n_updates}, every_n_env_steps={every_n_env_steps}: two clocks; "
                "leave one of them out"
            )
        self.tau = tau
        self.every_n_updates = every_n_updates
        self.every_n_env_steps = every_n_env_steps
        self._periods = 0

    def on_update_end(self, module: "DQN") -> None:
        """Called by `DQN` after each optimizer step."""
        if self.every_n_env_steps is not None:
            return
        if self.every_n_updates > 1 and module.trainer.global_step % self.every_n_updates:
            return
        module.update_target(self.tau)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move by the env-step clock, if that is the one."""
        if self.every_n_env_steps is None:
            return
        periods = data_of(trainer).env_steps // self.every_n_env_steps
        # a run may go on with another period: fewer of them have passed
        if periods != self._periods:
            self._periods = periods
            dqn(pl_module).update_target(self.tau)

    def state_dict(self) -> dict[str, Any]:
        """How often the env-step clock has come round."""
        return {"periods": self._periods}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._periods = state_dict["periods"]


@record_arguments
class PriorityUpdate(Callback):
    """Writes the priorities of the rows that were learnt from, and sets beta from the env-step clock.

    Both happen after every iteration, before the next is played and drawn. Where the memory's sampler does not learn
    from errors, as the uniform one, it does nothing.

    Args:
        beta_start: how far importance weights make up for priorities at env step 0, in [0, 1].
        beta_end: how far they do in the long run, in [0, 1].
        anneal_env_steps: env steps from the one to the other, linearly.

    Raises:
        ValueError: if a value is out of its range.
    """

    # under which its arguments are in the manifest of a run
    manifest_section: ClassVar[str] = "priorities"

    def __init__(self, *, beta_start: float = 0.4, beta_end: float = 1.0, anneal_env_steps: int = 100_000) -> None:
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 <= value <= 1:
                raise ValueError(f"priorities.{name}={value}: must be in [0, 1]")
        if anneal_env_steps < 1:
            raise ValueError(f"priorities.anneal_env_steps={anneal_env_steps}: must be at least 1")
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.anneal_env_steps = anneal_env_steps
        self._sampler: PrioritizedSampler | None = None

    def beta_at(self, env_steps: int) -> float:
        """Beta after so many env steps."""
        passed = min(1.0, env_steps / self.anneal_env_steps)
        return self.beta_start + (self.beta_end - self.beta_start) * passed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the sampler. Lightning draws the first batch before `on_train_batch_start`: beta is set here."""
        memory: Any = getattr(data_of(trainer).train_dataset, "memory", None)
        sampler: Any = getattr(memory, "sampler", None)
        self._sampler = sampler if hasattr(sampler, "write") else None
        self._set_beta(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the priorities of this iteration, if it had an update, and set the beta of the next."""
        if self._sampler is None:
            return
        if outputs:
            priority = outputs["priority"].to("cpu", torch.float32)
            self._sampler.write(batch.index.cpu().numpy().ravel(), priority.numpy().ravel())
        self._set_beta(trainer)

    def _set_beta(self, trainer: Trainer) -> None:
        if self._sampler is not None:
            self._sampler.beta = self.beta_at(data_of(trainer).env_steps)
