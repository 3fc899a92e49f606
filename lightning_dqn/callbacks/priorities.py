"""Takes TD errors back to the memory, whose prioritised sampler learns from them (Schaul et al. 2016).

The one arrow from the module to the data side.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dqn.callbacks.context import data_of
from lightning_dqn.resume.arguments import record_arguments

if TYPE_CHECKING:
    from lightning_dqn.replay import PrioritizedSampler


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
