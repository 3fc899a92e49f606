"""Folders of runs, and the run that a checkpoint belongs to."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dqn._compat.lightning import SLURM_CHECKPOINTS, relocate_checkpoints
from lightning_dqn.cli.errors import exit_with_error
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError

DEFAULT_ROOT = "runs"


def resolve_checkpoint(words: list[str]) -> list[str]:
    """Replace `best` and `last` in `--ckpt_path` and `--init_from` by the path of a checkpoint.

    Args:
        words: the command line, subcommand first.
    """
    flags = dict(flags_of(words))
    for option in ("--ckpt_path", "--init_from"):
        checkpoint = flags.get(option)
        if checkpoint in ("best", "last"):
            root = Path(flags.get("--trainer.default_root_dir", DEFAULT_ROOT))
            # the last value of an option counts
            words = [*words, option, str(_of_last_run(root, checkpoint, option))]
        elif checkpoint is not None and "://" not in checkpoint and not Path(checkpoint).is_file():
            exit_with_error(
                FileNotFoundError(f"{option} {checkpoint}: no such file here; give the path of a .ckpt, best or last")
            )
    return words


def _of_last_run(root: Path, name: str, option: str) -> Path:
    """The checkpoint `best` or `last` of the run that saved one last; exits with code 2 if it has none of this name."""
    saved = sorted(root.glob("*/*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        exit_with_error(FileNotFoundError(f"{option} {name}: no run in {root} has a checkpoint; give a path"))
    path = saved[-1].with_name(f"{name}.ckpt")
    if not path.is_file():
        # there is no best.ckpt before the first evaluation
        error = f"{option} {name}: the last run, {path.parents[1]}, has {saved[-1].name} only; use that, or give a path"
        exit_with_error(FileNotFoundError(error))
    return path


def flags_of(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield options and their values, from `--name value` and `--name=value`."""
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            yield name, value if equals else following


def read_checkpoint(plugin: AtomicCheckpointIO, path: str, option: str, *, for_fit: bool) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it; the trainer reuses the content.

    Args:
        plugin: checkpoint plugin of the trainer.
        path: path of a .ckpt file.
        option: option with the path, for errors.
        for_fit: whether a fit resumes from it, which needs the files beside it.
    """
    try:
        return plugin.read_ahead(path, for_fit=for_fit)
    except (CheckpointError, OSError) as error:
        exit_with_error(ValueError(f"{option} {error}"))


def relocate_best(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Update the paths of the best checkpoint of a run if the path of its folder has changed.

    Lightning resets the best score if the path of the folder has changed, and would overwrite the best checkpoint.

    Args:
        checkpoint: checkpoint that was checked for a fit; changed in place.
        callbacks: callbacks of the trainer; each `ModelCheckpoint` has the current path of the folder.
    """
    for callback in callbacks:
        # a checkpoint of weights has no states
        state, folder = checkpoint.get("callbacks", {}).get(callback.state_key), getattr(callback, "dirpath", None)
        if not isinstance(callback, ModelCheckpoint) or state is None or folder is None:
            continue
        relocate_checkpoints(state, folder, monitored=callback.monitor is not None)


def run_dir_of(checkpoint: str | None) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if it is not in one."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    folder = (path if len(path.parts) > 2 else path.absolute()).parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def new_run_folder(root: Path, env_id: str) -> Path:
    """Choose a new folder, root/environment/time; rank 0 creates it."""
    job = f"_job-{_slurm_job()}" if _slurm_job() else ""
    name = root / env_id.replace("/", "-").replace(":", "-") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}{job}"
    for attempt in itertools.count():
        folder = name.with_name(f"{name.name}_{attempt}") if attempt else name
        with contextlib.suppress(FileExistsError):
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                folder.mkdir(parents=True)
            return folder
    raise AssertionError


def _slurm_job() -> str:
    """The id of the current SLURM job, with which Lightning requeues it; empty outside of SLURM."""
    array, task = (os.environ.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def requeued_run(root: Path) -> Path | None:
    """The folder of the run that SLURM requeued, with Lightning's checkpoint; None if there is none."""
    if not _slurm_job() or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    found = sorted({path.parent for path in root.glob(f"*/*_job-{_slurm_job()}/{SLURM_CHECKPOINTS}")})
    if len(found) > 1:
        exit_with_error(
            ValueError(f"SLURM job {_slurm_job()} had several runs, {found}: give each its trainer.default_root_dir")
        )
    return found[0] if found else None
