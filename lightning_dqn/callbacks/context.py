"""What callbacks ask of a run: its folder, its data side and its learner, with their types."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning_dqn.data import DQNDataModule
    from lightning_dqn.module import DQN


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
