"""Moves the target net a little towards the policy net after updates (Lillicrap et al. 2016)."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning_dqn.module import DQN


class SoftTargetUpdate(Callback):
    """target_net <- (1 - tau) target_net + tau policy_net, after every k-th update.

    It happens inside the training step, right behind the optimizer, so that checkpoints never fall between the two.

    Args:
        tau: share of the way, in (0, 1]; 1 copies the policy net.
        every_n_updates: updates from one move to the next.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, *, tau: float = 0.005, every_n_updates: int = 1) -> None:
        if not 0 < tau <= 1:
            raise ValueError(f"target_update.tau={tau}: must be in (0, 1]; 1 copies the whole policy net")
        if every_n_updates < 1:
            raise ValueError(f"target_update.every_n_updates={every_n_updates}: must be at least 1")
        self.tau = tau
        self.every_n_updates = every_n_updates

    def on_update_end(self, module: "DQN") -> None:
        """Called by `DQN` after each optimizer step."""
        if self.every_n_updates > 1 and module.trainer.global_step % self.every_n_updates:
            return
        module.move_target(self.tau)
