"""Checks before a save and after a load that a checkpoint has only types that `torch.load(weights_only=True)` accepts.

The unpickler compares types, not their bases: `isinstance(numpy.float64(0), float)`, but it rejects a `numpy.float64`.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dqn.resume.content import check_dense, invalid
from lightning_dqn.resume.plain_form import INT_BITS

TENSORS = {Tensor, nn.Parameter}
TYPES = {
    *(type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device),
    *(dict, OrderedDict, list, tuple, set, *TENSORS),
}
# far above any checkpoint of this package; they end the search in containers that contain each other
MAX_DEPTH, MAX_VALUES = 64, 2**20


def check_serializable(checkpoint: dict[str, Any]) -> None:
    """Check that a resume will accept all values of a checkpoint.

    Args:
        checkpoint: checkpoint to save.

    Raises:
        TypeError: naming the key path and the type of the first value that is neither tensor nor plain.
    """
    for name, value in _values(checkpoint):
        kind = type(value)
        what = "" if kind in TYPES else f"of type {kind.__module__}.{kind.__qualname__}"
        if kind is int and value.bit_length() > INT_BITS:
            what = f"over {INT_BITS} bits long"
        if what:
            raise TypeError(
                f"{name} is {what}: checkpoints hold tensors and plain values only, so that opening one executes "
                "nothing; convert it in the state_dict it comes from"
            )


def check_loaded(checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is a tree of plain values and dense tensors, each with memory for all of its elements.

    Args:
        checkpoint: the loaded checkpoint. `requires_grad` of its tensors is set to False.

    Raises:
        CheckpointError: naming the first value that is something else.
    """
    for name, value in _values(checkpoint):
        if type(value) not in TYPES:
            invalid(name, f"is a {type(value).__name__}, neither plain nor a tensor")
        if type(value) in TENSORS:
            check_dense(value, name)
            value.requires_grad_(False)


def _values(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield key paths and values of a tree by level, including the pickled attributes of tensors and OrderedDicts.

    Raises:
        CheckpointError: if there are too many of them, or they are nested too deeply.
    """
    level, count = [("", tree)], 0
    for _ in range(MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            yield name.removeprefix("."), value
            if type(value) in (dict, OrderedDict):
                for key, item in value.items():
                    place = f"{name}.{key}" if type(key) is str else f"{name}[{key!r:.40}]"
                    below += [(place, item)] if type(key) is str else [(f"{place} (the key)", key), (place, item)]
            elif type(value) in (list, tuple, set):
                below += [(f"{name}[{i}]", item) for i, item in enumerate(value)]
            below += [(f"{name}.{key}", item) for key, item in getattr(value, "__dict__", {}).items()]
            if count + len(below) > MAX_VALUES:
                invalid(name.removeprefix("."), f"and other values are more than {MAX_VALUES}")
        level, count = below, count + len(below)
    if level:
        # shorten the path, which has 64 parts
        name = re.split(r"(?:\[0\]){3}", level[0][0].removeprefix("."))[0]
        invalid(name[:300], f"is nested more than {MAX_DEPTH} levels deep")
