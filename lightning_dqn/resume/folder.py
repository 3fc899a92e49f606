"""Files in a folder of checkpoints: temporaries, the parts that checkpoints refer to, and stale files.

Temporaries name the process that writes them. Parts are large memories, and the shards of ranks other than 0; they are
kept while a checkpoint of the folder refers to them. Their names don't contain that of a checkpoint: on SLURM,
Lightning treats every name that contains `ckpt_` as a checkpoint, and parses its version from all digits in it.
"""

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path

import torch

from lightning_dqn.resume.content import ENTRY, SCHEMA, CheckpointError

# equal memories of two checkpoints have one file, which is named by its hash
MEMORY_NAME = re.compile(r"memory-[0-9a-f]{16}\.safetensors")
SHARD_NAME = re.compile(r"share-[0-9a-f]{16}\.pt")
PART_NAME = re.compile(f"{MEMORY_NAME.pattern}|{SHARD_NAME.pattern}")
TEMPORARY_NAME = re.compile(r"\.saving-(\d{1,9})-([0-9a-f]{8})-[0-9a-f]{8}\.tmp")
# distinguishes this process from an earlier one with the same pid, as is common in containers
_PROCESS = secrets.token_hex(4)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Convert to a path of the local file system.

    Raises:
        CheckpointError: if it is the URL of a remote file.
    """
    text = os.fspath(path).removeprefix("file://")
    if "://" in text:
        raise CheckpointError(f"{text}: checkpoints are local files; copy it to this machine and give its path here")
    return Path(text)


def temporary(folder: Path) -> Path:
    """A unique path of a temporary file that `remove_stale_files` recognizes."""
    return folder / f".saving-{os.getpid()}-{_PROCESS}-{secrets.token_hex(4)}.tmp"


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, so that renames survive a power failure."""
    if os.name == "nt":  # can't open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def referenced_files(path: Path) -> set[str]:
    """Names of the memories and shards that a checkpoint needs; empty if the file is not a checkpoint.

    Raises:
        OSError: if it can't be read.
        CheckpointError: if a newer version wrote it.
    """
    # without parts in the folder the checkpoint need not be opened
    if not (path.parent.is_dir() and any(PART_NAME.fullmatch(name) for name in os.listdir(path.parent))):
        return set()
    names = _names_in(path)
    # shards refer to memories, not to other shards
    return names.union(*(_names_in(path.with_name(name)) for name in names if SHARD_NAME.fullmatch(name)))


def _names_in(path: Path) -> set[str]:
    """Names of the memories and shards that one file names."""
    try:
        # memory-mapped, so that only the index of the tensors is read
        entry = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[ENTRY]
        if entry["schema"] > SCHEMA:
            raise CheckpointError(f"{path}: written by a newer lightning_dqn")
        names = [*entry.get("shares", []), *([entry["memory"]["file"]] if "memory" in entry else [])]
        return {name for name in names if PART_NAME.fullmatch(name)}
    except FileNotFoundError:
        return set()
    except (OSError, CheckpointError):
        raise
    except Exception:  # a damaged file makes the unpickler raise almost anything
        return set()


def relocate_shards(shards: list[Path], folder: Path) -> None:
    """Move shards from other folders, with the files that they refer to, into the folder of their checkpoint.

    Args:
        shards: shards of all ranks except 0.
        folder: folder of the checkpoint.
    """
    for shard in shards:
        if shard.parent.resolve() == folder.resolve():
            continue
        names = {shard.name, *referenced_files(shard)}
        try:
            for name in names:
                new = temporary(folder)
                try:
                    _link_or_copy(shard.with_name(name), new)
                    os.replace(new, folder / name)
                finally:
                    with contextlib.suppress(OSError):
                        new.unlink()
        finally:
            remove_unneeded(shard.parent, names)


def _link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link to a file that is already synced, or a synced copy if links are not supported."""
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as old, target.open("xb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())


def remove_unneeded(folder: Path, parts: set[str]) -> list[Path]:
    """Remove the given memories and shards that no checkpoint in the folder needs.

    Args:
        folder: folder that contains them.
        parts: names of files that may have become unneeded.

    Returns:
        The removed files; none if a checkpoint can't be read, since it might refer to any of them.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError, CheckpointError):
        if parts:
            others = [path for path in folder.iterdir() if path.is_file() and not PART_NAME.fullmatch(path.name)]
            needed = set().union(
                *(referenced_files(path) for path in others if not TEMPORARY_NAME.fullmatch(path.name))
            )
            for path in (folder / name for name in sorted(parts - needed)):
                if path.exists():
                    path.unlink()
                    removed.append(path)
    return removed


def remove_stale_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the files that exited processes left behind; called at the start of a run.

    Args:
        folder: folder of checkpoints; it need not exist.

    Returns:
        The files that were removed: temporaries of dead processes, and parts that no checkpoint needs, unless
        a running process is saving there.
    """
    folder, removed, busy = Path(folder), [], False
    if not folder.is_dir():
        return []
    # list parts first: the checkpoint of a listed part is either still a temporary below, or complete and read later
    parts = {path.name for path in folder.iterdir() if PART_NAME.fullmatch(path.name)}
    for path in folder.iterdir():
        writer = TEMPORARY_NAME.fullmatch(path.name)
        if writer and _is_dead(int(writer[1]), writer[2]):
            with contextlib.suppress(OSError):
                path.unlink()
            removed.append(path)
        busy |= bool(writer) and path not in removed
    return removed if busy else removed + remove_unneeded(folder, parts)


def _is_dead(number: int, process: str) -> bool:
    """Whether no process with this pid runs, or its pid is now that of this process."""
    if number == os.getpid():
        return process != _PROCESS
    if os.name == "nt":  # where os.kill terminates the process
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
