"""The folder that checkpoints lie in: what is under way there, what belongs to what, and what the dead left behind.

Beside the checkpoints lie temporaries, which name the process that writes them, and memories, which live as long as
some checkpoint of the folder names them. Neither is named after its checkpoint: Lightning's resume on SLURM takes every
name that contains `ckpt_` for a checkpoint and reads its version out of all digits in it.
"""

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
# the key of a checkpoint that says how it was written
ENTRY = "lightning_dqn"
MEMORY_NAME = re.compile(r"memory-[0-9a-f]{16}\.bin")
TEMPORARY_NAME = re.compile(r"\.saving-(\d{1,9})-([0-9a-f]{8})-[0-9a-f]{8}\.tmp")
# tells this process from an earlier one of the same number: in containers they start alike
_PROCESS = secrets.token_hex(4)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is none that can be read; the message names the file and the remedy."""


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine's file system.

    Raises:
        CheckpointError: if it leads elsewhere.
    """
    text = os.fspath(path).removeprefix("file://")
    if "://" in text:
        raise CheckpointError(f"{text}: checkpoints are local files; copy it to this machine and give its path here")
    return Path(text)


def temporary(folder: Path) -> Path:
    """A name that no other file has and `sweep` recognises."""
    return folder / f".saving-{os.getpid()}-{_PROCESS}-{secrets.token_hex(4)}.tmp"


def memory_name(sha256: str) -> str:
    """The name of the memory with this hash: equal memories of two checkpoints share a file."""
    return f"memory-{sha256[:16]}.bin"


def sync_folder(folder: Path) -> None:
    """Let the names in a folder, which renames have changed, outlive a power cut."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_schema(checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse what a newer version wrote.

    Raises:
        CheckpointError: naming both versions.
    """
    schema = checkpoint.get(ENTRY, {}).get("schema", SCHEMA)
    if schema > SCHEMA:
        raise CheckpointError(
            f"{path}: written in schema {schema} by a newer lightning_dqn, this one reads up to {SCHEMA}; upgrade it"
        )


def memories_of(path: Path) -> set[str]:
    """Names of the memories that a checkpoint needs; none if it is no checkpoint.

    Raises:
        OSError: if it can't be read.
        CheckpointError: if a newer version wrote it.
    """
    # small checkpoints need not be opened for this
    if not (path.parent.is_dir() and any(MEMORY_NAME.fullmatch(name) for name in os.listdir(path.parent))):
        return set()
    try:
        # mapped, so that only the index of its tensors is read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        entry = checkpoint[ENTRY]
    except FileNotFoundError:
        return set()
    except OSError:
        raise
    except Exception:  # a damaged file makes the unpickler raise almost anything
        return set()
    check_schema(checkpoint, path)
    return {entry["memory"]["file"]} if "memory" in entry else set()


def remove_unneeded(folder: Path, memories: set[str]) -> list[Path]:
    """Remove those of these memories that no checkpoint in the folder names.

    Args:
        folder: where they lie.
        memories: names of files that may have become unneeded.

    Returns:
        What was removed; nothing as long as a checkpoint can't be read, which might name any of them.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError, CheckpointError):
        if memories:
            others = [path for path in folder.iterdir() if path.is_file() and not MEMORY_NAME.fullmatch(path.name)]
            needed = set().union(*(memories_of(path) for path in others if not TEMPORARY_NAME.fullmatch(path.name)))
            for path in (folder / name for name in sorted(memories - needed)):
                if path.exists():
                    path.unlink()
                    removed.append(path)
    return removed


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what processes that are no more left behind; for the start of a run.

    Args:
        folder: where checkpoints lie, or will lie.

    Returns:
        The files that were removed: temporaries of dead processes, and memories that no checkpoint names, unless
        a living process is about to save there.
    """
    folder, removed, busy = Path(folder), [], False
    if not folder.is_dir():
        return []
    # in this order: of a memory in the list the checkpoint is either under way below, or done and read after that
    memories = {path.name for path in folder.iterdir() if MEMORY_NAME.fullmatch(path.name)}
    for path in folder.iterdir():
        writer = TEMPORARY_NAME.fullmatch(path.name)
        if writer and _is_dead(int(writer[1]), writer[2]):
            with contextlib.suppress(OSError):
                path.unlink()
            removed.append(path)
        busy |= bool(writer) and path not in removed
    return removed if busy else removed + remove_unneeded(folder, memories)


def _is_dead(number: int, process: str) -> bool:
    """Whether no process of this number runs, or this one has inherited it."""
    if number == os.getpid():
        return process != _PROCESS
    if os.name == "nt":  # where this kill kills
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
