"""Checks before a save and after a load that a checkpoint has only types that `torch.load(weights_only=True)` accepts.

The unpickler compares types, not their bases: `isinstance(numpy.float64(0), float)`, but it rejects a `numpy.float64`.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dqn.resume.content import invalid

LEAVES = {type(None), bool, float, complex, str, bytes, torch.Size, torch.dtype, torch.device}
# the largest int of pickle's LONG1 opcode (255 bytes); the unpickler rejects LONG4
INT_BITS = 2039
# far above any checkpoint of this package; containers that contain each other would never end
MAX_DEPTH, MAX_VALUES = 64, 2**20


def check_serializable(checkpoint: dict[str, Any]) -> None:
    """Check that a resume will accept all values of a checkpoint.

    Args:
        checkpoint: as it is about to be saved.

    Raises:
        TypeError: naming the key path and the type of the first value that is neither tensor nor plain.
    """
    for where, what in _others(checkpoint, ""):
        raise TypeError(
            f"{where.removeprefix('.')} is {what}: checkpoints hold tensors and "
            "plain values only, so that opening one executes nothing; convert it in the state_dict it comes from"
        )


def _others(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Key paths of all values that are not plain, and what they are."""
    kind = type(value)
    if kind in LEAVES or (kind is int and value.bit_length() <= INT_BITS):
        return
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            place = f".{key}" if type(key) is str else f"[{key!r}]"
            yield from _others(key, f"{where}{place} (the key)")
            yield from _others(item, where + place)
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            yield from _others(item, f"{where}[{index}]")
    elif kind not in (Tensor, nn.Parameter):
        yield (
            where,
            f"of type {kind.__module__}.{kind.__qualname__}" if kind is not int else f"over {INT_BITS} bits long",
        )
    # attributes of a tensor or an OrderedDict are pickled with it
    for name, item in getattr(value, "__dict__", {}).items():
        yield from _others(item, f"{where}.{name}")


def check_loaded(checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is a tree of plain values and dense tensors, each with memory for all of its elements.

    Args:
        checkpoint: as it was read. Gradients are switched off for its tensors.

    Raises:
        CheckpointError: naming the first value that is something else.
    """
    level: list[tuple[str, Any]] = [("", checkpoint)]
    count = 0
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            parts = list(_parts(value, name))
            count += len(parts)
            if count > MAX_VALUES:
                invalid(name.removeprefix("."), f"and other values are more than {MAX_VALUES}")
            below += [part for part in parts if not _is_leaf(part[1])]
        level = below
    if level:
        # the whole path has 64 parts
        name = re.split(r"(?:\[0\]){3}", level[0][0].removeprefix("."))[0]
        invalid(name[:300], f"is nested more than {MAX_DEPTH} levels deep")


def _is_leaf(value: Any) -> bool:
    return type(value) in LEAVES or type(value) is int


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Names and values of what is in a container; a tensor is checked and has none."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            place = f"{name}.{key if _is_leaf(key) else '(a key)'}"
            yield from [] if _is_leaf(key) else [(place, key)]
            yield place, item
    elif kind in (list, tuple, set):
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
    elif kind in (Tensor, nn.Parameter):
        _check_dense(value, name.removeprefix("."))
    else:
        invalid(name.removeprefix("."), f"is a {kind.__name__}, neither plain nor a tensor")
    for key, item in getattr(value, "__dict__", {}).items():
        yield f"{name}.{key}", item


def _check_dense(value: Tensor, name: str) -> None:
    """Check that a tensor is strided, materialized, and has storage for all of its elements.

    An expanded tensor of a few bytes can have any size.
    """
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        invalid(name, "is not a dense tensor")
    if value.is_conj() or value.is_neg():
        invalid(name, "is a view that is yet to be computed")
    if (value.storage_offset() + value.numel()) * value.element_size() > value.untyped_storage().nbytes():
        invalid(name, "has fewer values than elements")
    value.requires_grad_(False)
