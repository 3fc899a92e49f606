"""Where runs lie: a new folder for each, and the run that a checkpoint belongs to."""

import contextlib
import itertools
import os
import pickle
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dqn.cli.errors import refuse

DEFAULT_ROOT = "runs"


def with_run_config(words: list[str]) -> list[str]:
    """The command line with `best` and `last` made paths, and the configuration of the run they belong to.

    Args:
        words: the command line, subcommand first.

    Returns:
        The same, with `--config` where none was given and the run that the checkpoint belongs to has one.
    """
    flags = dict(_flags(words))
    checkpoint = flags.get("--ckpt_path")
    if checkpoint in ("best", "last"):
        root = Path(flags.get("--trainer.default_root_dir", DEFAULT_ROOT))
        found = sorted(root.glob(f"*/*/checkpoints/{checkpoint}.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            refuse(
                FileNotFoundError(f"--ckpt_path {checkpoint}: no run in {root} has such a checkpoint; give its path")
            )
        # the last word counts
        checkpoint = str(found[-1])
        words = [*words, "--ckpt_path", checkpoint]
    if checkpoint is None:
        return words
    if not Path(checkpoint).is_file():
        refuse(
            FileNotFoundError(f"--ckpt_path {checkpoint}: no such file here; give the path of a .ckpt, best or last")
        )
    if "--config" in flags or "-c" in flags:
        return words
    run = run_of(checkpoint)
    if run is None:
        return words
    config = run / "config.yaml"
    sys.stderr.write(f"Using {config}, which lies with the checkpoint.\n")
    return [words[0], "--config", str(config), *words[1:]]


def _flags(words: list[str]) -> Iterator[tuple[str, str]]:
    """Flags and their values, in either spelling."""
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            yield name, value if equals else following


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint as plain values and tensors; nothing in it is executed.

    Args:
        path: of a .ckpt file.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        content["state_dict"].keys()
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, pickle.UnpicklingError) as error:
        kind = type(error).__name__
        refuse(ValueError(f"--ckpt_path {path}: not a checkpoint of this package, or a damaged one ({kind})"))
    return content


def run_of(checkpoint: str | None) -> Path | None:
    """The folder of the run that a checkpoint belongs to, if it lies in one."""
    if checkpoint is None or not (Path(checkpoint).parent.parent / "config.yaml").is_file():
        return None
    return Path(checkpoint).parent.parent


def new_run_folder(root: Path, env_id: str) -> Path:
    """Make a folder that no other run has: root/environment/time. Ranks but the first write nothing and make none."""
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
    """The id of the SLURM job we are in, as Lightning requeues it; empty outside."""
    array, task = (os.environ.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def requeued_run(root: Path) -> Path | None:
    """The folder of the run that stopped when SLURM requeued this job; Lightning finds its checkpoint there."""
    if not _slurm_job() or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    found = sorted({path.parent for path in root.glob(f"*/*_job-{_slurm_job()}/hpc_ckpt_*.ckpt")})
    if len(found) > 1:
        refuse(
            ValueError(f"SLURM job {_slurm_job()} had several runs, {found}: give each its trainer.default_root_dir")
        )
    return found[0] if found else None
