"""What may be in a checkpoint: what `torch.load(weights_only=True)` gives back, looked at while it can still be mended.

The unpickler compares types, not their bases: a `numpy.float64` is a `float` to `isinstance`, and is refused at resume.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LEAVES = {type(None), bool, float, complex, str, bytes, torch.Size, torch.dtype, torch.device}
# what the pickle protocol of torch.save holds in 255 bytes; the unpickler knows no longer form
INT_BITS = 2039


def check_plain(checkpoint: dict[str, Any]) -> None:
    """Refuse what would be refused at resume.

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
    # what was hung on a tensor or an OrderedDict is pickled with it
    for name, item in getattr(value, "__dict__", {}).items():
        yield from _others(item, f"{where}.{name}")
