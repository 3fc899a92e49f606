"""Moves the target net towards the policy net after updates: a little, or all the way."""

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dqn.callbacks.context import data_of, dqn
from lightning_dqn.resume.arguments import record_arguments

if TYPE_CHECKING:
    from lightning_dqn.module import DQN


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
        module.move_target(self.tau)

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
            dqn(pl_module).move_target(self.tau)

    def state_dict(self) -> dict[str, Any]:
        """How often the env-step clock has come round."""
        return {"periods": self._periods}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._periods = state_dict["periods"]
