"""Large replay memories in a safetensors file beside the checkpoint, memory-mapped when loaded.

The checkpoint holds a record of the file: its name, its sha256, and the key path of the dict its tensors belong to.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_dqn.resume.content import CheckpointError, check_dict, invalid
from lightning_dqn.resume.folder import MEMORY_NAME

# key path of the rows in the state of a data module
ROWS = ("train", "memory", "rows")
# https://huggingface.co/docs/safetensors/index#format
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# safetensors accepts up to 100 MB, which take a minute to parse
MAX_HEADER_BYTES = 2**20


def split_large_rows(
    checkpoint: dict[str, Any], max_bytes: int
) -> tuple[dict[str, Any], Sequence[str], dict[str, Tensor]]:
    """Separate the rows of the replay memory from a checkpoint if they are large.

    Args:
        checkpoint: checkpoint from Lightning; not changed.
        max_bytes: largest size of rows that stay in the checkpoint.

    Returns:
        The checkpoint without them, the key path of their dict, and the tensors by name; empty if they are not large.
    """
    # Lightning saves the state of a data module under the name of its class, which may be a subclass
    paths = ((key, *ROWS) for key in checkpoint if type(key) is str)
    found = next((path for path in paths if isinstance(_item(checkpoint, path), dict)), ())
    rows = _item(checkpoint, found) if found else {}
    tensors = {name: value for name, value in rows.items() if type(value) is Tensor and value.dtype in DTYPES}
    if sum(tensor.nbytes for tensor in tensors.values()) <= max_bytes:
        return dict(checkpoint), (), {}
    rest = {name: value for name, value in rows.items() if name not in tensors}
    return _with_item(checkpoint, found, rest), found, tensors


def _item(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _with_item(tree: dict[str, Any], path: Sequence[str], item: dict[str, Any]) -> dict[str, Any]:
    """Copy a tree of dicts with another item at a key path; values off the path are shared."""
    return {**tree, path[0]: _with_item(tree[path[0]], path[1:], item)} if path else item


def write_sidecar(tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Write tensors into a new safetensors file and flush it to the disk.

    safetensors' own writer does not compute a hash, and hides the errors of the operating system.

    Args:
        tensors: dense tensors by name, with dtypes in `DTYPES`.
        path: path of the new file.

    Returns:
        The file's final name and its sha256.
    """
    # the format has no padding: descending item sizes keep every tensor aligned
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    buffers = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data for _, tensor in ordered]
    ends = itertools.accumulate(len(buffer) for buffer in buffers)
    header = json.dumps(
        {
            name: {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [end - tensor.nbytes, end]}
            for (name, tensor), end in zip(ordered, ends, strict=True)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    parts: list[memoryview | bytes] = [len(header).to_bytes(8, "little"), header, *buffers]
    # hashing takes as long as writing; both release the GIL
    with ThreadPoolExecutor(1) as hasher, path.open("xb") as file:
        sha256 = hasher.submit(_sha256, parts)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        digest = sha256.result()
    return {"file": f"memory-{digest[:16]}.safetensors", "sha256": digest}


def _sha256(parts: Sequence[memoryview | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def load_sidecar(checkpoint: dict[str, Any], record: Any, path: Path) -> None:
    """Add the tensors that a record of a checkpoint names to the dict that they were separated from.

    They are memory-mapped and private: they are read when used, and writing to them does not change the file.

    Args:
        checkpoint: changed in place.
        record: record of the file in the checkpoint.
        path: path of the checkpoint.

    Raises:
        CheckpointError: if the record is malformed, or the file is missing or has another hash.
    """
    name = f"{path}: lightning_dqn.memory"
    check_dict(record, name, ("at", "file", "sha256"))
    at, file = record["at"], record["file"]
    if type(file) is not str or not MEMORY_NAME.fullmatch(file):
        invalid(f"{name}.file", "is not the name of a memory")
    keys = at if type(at) is list and at and all(type(key) is str for key in at) else [""]
    target = _item(checkpoint, keys)
    if type(target) is not dict:
        invalid(f"{name}.at", "is not the path of a dict")
    target.update(_map(path.resolve().parent / file, record["sha256"]))


def _map(path: Path, sha256: Any) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose hash is known.

    Raises:
        CheckpointError: if the file is missing, has another hash or is malformed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, the memory that a checkpoint needs: copy it with the checkpoint")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise CheckpointError(f"{path} is damaged, its hash is not the one that was saved: use another checkpoint")
    try:
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header_bytes} bytes")
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({str(error).splitlines()[0]}); use another") from error
    return tensors
