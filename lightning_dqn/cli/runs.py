"""Where runs lie: a new folder for each, and the run that a checkpoint belongs to."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dqn.checkpoint_io import AtomicCheckpointIO, CheckpointError
from lightning_dqn.cli.errors import refuse

DEFAULT_ROOT = "runs"
# sections of a configuration that decide on what is learnt, and what in them does not
LEARNING = ("seed_everything", "data", "model", "target_update", "epsilon", "priorities")
FREE = (
    *("data.eval_episodes", "data.eval_max_steps", "data.save_memory", "data.memory_device", "data.memory_folder"),
    *("data.env_kwargs", "model.init_args.compile"),
)


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
    # what leads elsewhere is refused by who reads it
    if "://" not in checkpoint and not Path(checkpoint).is_file():
        refuse(
            FileNotFoundError(f"--ckpt_path {checkpoint}: no such file here; give the path of a .ckpt, best or last")
        )
    if "--config" in flags or "-c" in flags:
        return words
    run = run_of(checkpoint)
    if run is None:
        return words
    config = run / "config.yaml"
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        sys.stderr.write(f"Using {config}, which lies with the checkpoint.\n")
    return [words[0], "--config", str(config), *words[1:]]


def _flags(words: list[str]) -> Iterator[tuple[str, str]]:
    """Flags and their values, in either spelling."""
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            yield name, value if equals else following


def read_checkpoint(plugin: AtomicCheckpointIO, path: str) -> dict[str, Any]:
    """A checkpoint as plain values and tensors; nothing in it is executed. The trainer is handed what is read here.

    Args:
        plugin: of the trainer.
        path: of a .ckpt file.
    """
    try:
        content = plugin.read_ahead(path)
    except (CheckpointError, OSError) as error:
        refuse(ValueError(f"--ckpt_path {error}"))
    if not isinstance(content.get("state_dict"), dict) or "spaces" not in content:
        refuse(ValueError(f"--ckpt_path {path}: not a checkpoint of this package; use another one"))
    return content


def refuse_contradictions(config: dict[str, Any], saved: Path) -> None:
    """Let a run go on with the knobs that it was made with, or not at all.

    What decides on learning must be the same: the seed and all of data, model, target_update, epsilon and priorities
    but for FREE. What only watches, saves or ends the run may differ: trainer, checkpoint, plot, video, progress_bar.
    The checkpoint has a hash of the environment's arguments, which is compared later.

    Args:
        config: of the run as it shall go on.
        saved: the configuration that it was made with.
    """
    then, now = _flat(yaml.safe_load(saved.read_text())), _flat(config)
    for key in sorted(then.keys() & now.keys()):
        if key.partition(".")[0] in LEARNING and not key.startswith(FREE) and then[key] != now[key]:
            flag = key.replace(".init_args", "").replace(".class_path", "")
            refuse(
                ValueError(
                    f"--{flag}={now[key]} contradicts {then[key]}, which the run was made with ({saved}): "
                    "leave it out, or start a new run without --ckpt_path"
                )
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a configuration by their dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def relocate_best(checkpoint: dict[str, Any], folder: str) -> None:
    """Let Lightning find the best checkpoint of a run whose folder was moved, or is called from another place.

    It forgets the best score where the folder is not written as it was, and would overwrite the best by the next.

    Args:
        checkpoint: changed in place.
        folder: of the checkpoints, as the trainer will call it.
    """
    for state in checkpoint["callbacks"].values():
        before = state.get("dirpath") if isinstance(state, dict) else None
        if before and before != folder and (Path(folder) / Path(state["best_model_path"]).name).is_file():
            moved = {path: str(Path(folder) / Path(path).name) for path in state["best_k_models"]}
            state["best_k_models"] = {moved[path]: score for path, score in state["best_k_models"].items()}
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = state[name] and str(Path(folder) / Path(state[name]).name)
            state["dirpath"] = folder


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
