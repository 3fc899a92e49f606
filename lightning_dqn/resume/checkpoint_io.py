"""A `CheckpointIO` with atomic saves: a checkpoint is written to a temporary file, flushed and renamed."""

import contextlib
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from lightning_dqn._compat.torch import rejected_type
from lightning_dqn.resume.content import ENTRY, SCHEMA, CheckpointError, check_header, invalid
from lightning_dqn.resume.folder import (
    PART_NAME,
    SHARD_NAME,
    local_path,
    referenced_files,
    relocate_shards,
    remove_unneeded,
    sync_folder,
    temporary,
)
from lightning_dqn.resume.serializable import check_loaded, check_serializable
from lightning_dqn.resume.sidecar import load_sidecar, split_large_rows, write_sidecar


class AtomicCheckpointIO(CheckpointIO):
    """Saves checkpoints atomically and loads them without executing code: `Trainer(plugins=[AtomicCheckpointIO()])`.

    An interrupted save leaves the previous checkpoint and its memory unchanged. Checkpoints contain tensors and plain
    values only; this is checked before a save and after a load. Temporary files are written to the target's folder.

    Args:
        max_inline_bytes: largest size of a memory, in bytes, that is saved inside its checkpoint; a larger one is saved
            in a safetensors file beside it.

    Raises:
        ValueError: if max_inline_bytes is negative.
    """

    def __init__(self, *, max_inline_bytes: int = 256 * 2**20) -> None:
        if max_inline_bytes < 0:
            raise ValueError(f"max_inline_bytes={max_inline_bytes}: must be 0 or more")
        self.max_inline_bytes = max_inline_bytes
        self._ahead: tuple[Path, dict[str, Any]] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, and a large memory beside it; called by Lightning on rank 0.

        Args:
            checkpoint: checkpoint from Lightning.
            path: path of a local file.
            storage_options: must be None; Lightning's interface has it for remote files.

        Raises:
            TypeError: if a value is neither a tensor nor plain, naming its key path.
            CheckpointError: if the path is remote or the file can't be written; the old checkpoint is unchanged.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options}: checkpoints are local files, which have none")
        target = local_path(path)
        check_serializable(checkpoint)
        shards = [Path(path) for path in checkpoint.get("shares", [])]
        self._save({name: part for name, part in checkpoint.items() if name != "shares"}, target, shards)

    def save_shard(self, content: dict[str, Any], folder: str | os.PathLike[str]) -> Path:
        """Write the shard of a rank other than 0; the checkpoint names it under `shares`.

        Args:
            content: state of the rank; a memory has the same key path as in a checkpoint.
            folder: folder of the checkpoint.

        Returns:
            Path of the file. `remove_stale_files` removes it unless a checkpoint that names it is saved.

        Raises:
            TypeError: as `save_checkpoint`.
            CheckpointError: as `save_checkpoint`.
        """
        target = local_path(folder) / f"share-{secrets.token_hex(8)}.pt"
        check_serializable(content)
        self._save(content, target, [])
        return target

    def _save(self, checkpoint: dict[str, Any], target: Path, shards: list[Path]) -> None:
        """Write a checkpoint or a shard.

        Raises:
            CheckpointError: if the operating system reports an error, with its text.
        """
        content, at, tensors = split_large_rows(checkpoint, self.max_inline_bytes)
        content[ENTRY] = {"schema": SCHEMA}
        if shards:
            content[ENTRY]["shares"] = [path.name for path in shards]
        if tensors:
            content[ENTRY]["memory"] = {"at": list(at)}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._write(content, tensors, target, shards)
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise CheckpointError(
                f"{target}: not saved ({cause.strerror}); the previous checkpoint is unchanged. "
                "Free space in that folder, or choose another one"
            ) from error

    def _write(self, content: dict[str, Any], tensors: dict[str, Tensor], target: Path, shards: list[Path]) -> None:
        """Write all files under temporary names; rename the memory first, since the checkpoint names it.

        Args:
            content: content of the checkpoint.
            tensors: tensors of a large memory; empty without one.
            target: path of the checkpoint, which is renamed last.
            shards: shards of the other ranks, already written for this checkpoint.
        """
        folder = target.parent
        new, new_memory = temporary(folder), temporary(folder)
        stale = {shard.name for shard in shards}.union(*map(referenced_files, (target, *shards)))
        try:
            relocate_shards(shards, folder)
            if tensors:
                record = write_sidecar(tensors, new_memory)
                content[ENTRY]["memory"] |= record
            with new.open("xb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if tensors:
                stale.add(record["file"])
                os.replace(new_memory, folder / record["file"])
                sync_folder(folder)
            os.replace(new, target)
            sync_folder(folder)
            if PART_NAME.fullmatch(target.name):
                # the checkpoint that names it is not saved yet
                stale.clear()
        finally:
            for path in (new, new_memory):
                with contextlib.suppress(OSError):
                    path.unlink()
            # files of the old checkpoint after its rename, else those of the new one
            remove_unneeded(folder, stale)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without executing anything in it; a damaged file raises an error.

        Args:
            path: path of a local file.
            map_location: device of its tensors, the CPU by default; a memory beside it is memory-mapped on the CPU.
            weights_only: always true; False raises an error.

        Returns:
            The saved checkpoint. With several ranks, that of rank 0 with the paths of the other shards under `shares`.

        Raises:
            ValueError: if weights_only is false.
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is remote, damaged, unsafe, from a newer version, or its memory has another hash.
        """
        if weights_only is False:
            raise ValueError(
                "weights_only=False: checkpoints hold plain values, opening one executes nothing; leave it out"
            )
        target = local_path(path)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == target:
            return ahead[1]
        checkpoint = self.load_agent_part(target, map_location)
        entry = checkpoint[ENTRY]
        if "shares" in entry:
            names = entry.pop("shares")
            if type(names) is not list or not all(type(name) is str and SHARD_NAME.fullmatch(name) for name in names):
                invalid(f"{target}: {ENTRY}.shares", "is not a list of names of shards")
            checkpoint["shares"] = [str(target.resolve().with_name(name)) for name in names]
        if "memory" in entry:
            load_sidecar(checkpoint, entry.pop("memory"), target)
        return checkpoint

    def load_agent_part(self, path: str | os.PathLike[str], map_location: Any | None = None) -> dict[str, Any]:
        """Read a checkpoint without the files beside it, which only a resumed fit needs: memory, shards of other ranks.

        Args:
            path: path of a local file; errors are those of `load_checkpoint`.
            map_location: device of its tensors, the CPU by default.
        """
        target = local_path(path)
        if not target.is_file():
            if SHARD_NAME.fullmatch(target.name):
                raise CheckpointError(f"{target} is missing, the shard of a rank: copy it with the checkpoint")
            raise FileNotFoundError(f"{target}: no such checkpoint")
        checkpoint = _read(target, map_location or "cpu")
        try:
            check_loaded(checkpoint)
            check_header(checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{target}: {error}") from None
        if "state_dict" in checkpoint:
            # else Lightning would migrate an older checkpoint before it is checked
            checkpoint["pytorch-lightning_version"] = pl.__version__
        # only the names in the entry are used
        checkpoint.pop("shares", None)
        return checkpoint

    def read_ahead(self, path: str | os.PathLike[str], *, for_fit: bool = True) -> dict[str, Any]:
        """Read a checkpoint before Lightning loads it; the next `load_checkpoint` of the path returns this content.

        Args:
            path: path of a local file; errors are those of `load_checkpoint`.
            for_fit: whether to read also the files beside it, see `load_agent_part`.
        """
        content = self.load_checkpoint(path) if for_fit else self.load_agent_part(path)
        self._ahead = local_path(path), content
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, and its memory and shards unless another checkpoint in the folder needs them.

        Args:
            path: path of a local file; it need not exist.
        """
        target = local_path(path)
        parts = referenced_files(target)
        target.unlink(missing_ok=True)
        remove_unneeded(target.parent, parts)


def _read(target: Path, map_location: Any) -> dict[str, Any]:
    """The content of a file, without the files beside it."""
    with target.open("rb") as file:
        try:
            _check_sums(zipfile.ZipFile(file))
            file.seek(0)
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
            if not isinstance(checkpoint, dict):
                raise TypeError(f"it holds a {type(checkpoint).__name__}")
        except Exception as error:  # a damaged file makes the unpickler raise almost anything
            raise CheckpointError(f"{target}: {_reason(error)}; use another checkpoint") from error
    return checkpoint


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Check the CRCs of the archive, which torch.load does not: it would load a weight with a flipped bit."""
    # torch.load reads nothing for an entry marked as a folder, and returns uninitialized memory
    marked = [part.filename for part in archive.infolist() if part.external_attr]
    # torch.save does not compress: a small compressed file could fill the RAM
    packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
    size = os.fstat(archive.fp.fileno()).st_size  # type: ignore[union-attr]
    if packed or sum(part.file_size for part in archive.infolist()) > size:
        raise zipfile.BadZipFile("its parts are compressed, or overlap")
    damaged = marked[0] if marked else archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong attributes or checksum of {damaged}")


def _reason(error: Exception) -> str:
    """The reason for rejecting a file; torch's own message recommends weights_only=False."""
    unsafe = rejected_type(error)
    if unsafe:
        return f"holds {unsafe}, which is no plain value, so nothing of it was loaded or executed"
    return f"damaged, or not a checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})"


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system; torch.save raises another one on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
