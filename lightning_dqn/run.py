"""The parts of a run that callbacks read from the trainer."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def run_folder(trainer: Trainer) -> Path:
    """The trainer's `default_root_dir` if one was given, else the logger's folder of this run; created by rank 0.

    `Trainer.log_dir` can't be used here: it is a collective call, and a single rank may need the folder.
    """
    folder = Path(trainer.default_root_dir)
    if folder.resolve() == Path.cwd():
        logger = trainer.logger
        folder = Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or folder)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_of(trainer: Trainer) -> Any:
    """The data module of the run.

    Raises:
        MisconfigurationException: if the trainer has no data module.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None:
        raise MisconfigurationException("The trainer has no data module: call trainer.fit(model, datamodule=...)")
    return datamodule
