"""File names of Weights & Biases."""

from pathlib import Path


def latest_run_id(save_dir: str) -> str | None:
    """The id of the run that was started last in a folder, online or offline; None if there is none.

    Args:
        save_dir: `dir` of `wandb.init`. The folder of a run there is `wandb/(offline-)run-<date>_<time>-<id>`.
    """
    folders = sorted(Path(save_dir).glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
    return folders[-1].name.rpartition("-")[2] if folders else None
