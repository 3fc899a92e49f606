"""Large memories in a file of their own: raw bytes beside the checkpoint, named by their hash, mapped when read.

The checkpoint keeps a record of the file: its name and hash, and each tensor's dtype, shape and offset in it.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dqn.checkpoint_io.folder import MEMORY_NAME, memory_name
from lightning_dqn.resume.content import CheckpointError

# bytes; tensors start at multiples of it, as any dtype needs
ALIGNMENT = 64


def take_out(
    checkpoint: dict[str, Any], keys: Sequence[str], max_bytes: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Separate the tensors under a key path if they are large.

    Args:
        checkpoint: which stays as it is.
        keys: path to a dict of tensors; it need not exist.
        max_bytes: up to which nothing is taken out.

    Returns:
        A checkpoint without the tensors, and the tensors.
    """
    inner: Any = checkpoint
    for key in keys:
        inner = inner.get(key) if isinstance(inner, dict) else None
    items = inner.items() if isinstance(inner, dict) else ()
    tensors = {name: value for name, value in items if type(value) is Tensor}
    if sum(tensor.nbytes for tensor in tensors.values()) <= max_bytes:
        return dict(checkpoint), {}
    return _replaced(checkpoint, keys, {name: value for name, value in items if name not in tensors}), tensors


def _replaced(tree: dict[str, Any], keys: Sequence[str], leaf: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tree of dicts along a key path, with another leaf at its end."""
    return {**tree, keys[0]: _replaced(tree[keys[0]], keys[1:], leaf)} if keys else leaf


def write_beside(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Write tensors into a new file and see that they reach the disk.

    Args:
        tensors: by name; dense ones.
        path: of the new file.

    Returns:
        The record of the file under the name it is to get.
    """
    places: dict[str, Any] = {}
    parts: list[memoryview | bytes] = []
    end = 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        places[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "offset": end}
        parts += [data, bytes(-len(data) % ALIGNMENT)]
        end += len(data) + len(parts[-1])
    # hashing takes as long as writing, and both let go of Python's lock
    with ThreadPoolExecutor(1) as hasher, path.open("xb") as file:
        sha256 = hasher.submit(_sha256, parts)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        digest = sha256.result()
    return {"file": memory_name(digest), "sha256": digest, "bytes": end, "tensors": places}


def _sha256(parts: Sequence[memoryview | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def map_beside(record: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors of a record, mapped: read when they are used, and private, so that writing leaves the file alone.

    Args:
        record: as `write_beside` returned it.
        folder: where the file lies.

    Raises:
        CheckpointError: if the file is missing or not what was written.
    """
    path = folder / record["file"]
    if not MEMORY_NAME.fullmatch(record["file"]):
        raise CheckpointError(f"{path}: not the name of a memory; this checkpoint was not written by this package")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, the memory that a checkpoint needs: copy it with the checkpoint")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            raise CheckpointError(f"{path} is damaged, its hash is not the one that was saved: use another checkpoint")
        everything = torch.from_numpy(np.memmap(file, np.uint8, mode="c"))
    return {
        name: everything[place["offset"] :][: math.prod(place["shape"]) * place["dtype"].itemsize]
        .view(place["dtype"])
        .view(place["shape"])
        for name, place in record["tensors"].items()
    }
