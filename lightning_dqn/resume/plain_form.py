"""Converts arguments of any type to plain values; a value without a plain form is replaced by a digest."""

import contextlib
import datetime
import hashlib
from decimal import Decimal
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

# types whose repr is the same in every process
BY_REPR = (bytes, bytearray, complex, range, Decimal, PurePath, datetime.date, datetime.time, datetime.timedelta)
# torch.load(weights_only=True) rejects longer ints
INT_BITS = 2039
CHUNK_ITEMS = 2**16


def plain_form(value: Any) -> Any:
    """Convert a value to None, bool, int, float, str, and lists, tuples and dicts of these, dict keys included.

    Numpy scalars become Python numbers. Everything else, and a dict with other keys as a whole, is replaced by
    `{"digest": "TYPE sha256:HEX"}`, which is the same in every process. The digest of an array, or of an object with
    `__array__`, covers dtype, shape and content, that of a function or class its name. For other objects, and for
    containers that contain themselves, it covers only the name of the type: other attributes may differ between
    processes.

    Args:
        value: of any type; not changed.
    """
    return _plain(value, ())


def path_step(key: Any) -> str:
    """The suffix that a key or an index adds to the path of a container: `.name`, else `[0]`."""
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    """The plain form of a value inside of containers with the ids `above`."""
    value = value.item() if isinstance(value, np.generic) else value
    if _is_scalar(value):
        return _of_base_class(value)
    within = (*above, id(value))
    if isinstance(value, (list, tuple)) and id(value) not in above:
        items = [_plain(item, within) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict) and id(value) not in above and all(map(_is_plain_key, value)):
        return {_plain(key, ()): _plain(item, within) for key, item in value.items()}
    return _as_digest(value, above)


def _is_scalar(value: Any) -> bool:
    short = isinstance(value, int) and value.bit_length() <= INT_BITS
    return value is None or isinstance(value, (float, str)) or short


def _is_plain_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_plain_key, key))
    return _is_scalar(key.item() if isinstance(key, np.generic) else key)


def _of_base_class(value: Any) -> Any:
    """Convert a scalar of a subclass, such as an enum, to the builtin type."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    return int(value) if isinstance(value, int) else float(value)


def _as_digest(value: Any, above: tuple[int, ...]) -> dict[str, str]:
    """The digest of the properties of a value that are the same in every process, at least its type's name."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    found = hashlib.sha256(name.encode())
    if id(value) in above:
        pass
    elif isinstance(value, int):
        found.update(hex(value).encode())
    elif isinstance(value, BY_REPR):
        found.update(repr(value).encode())
    elif isinstance(value, (set, frozenset)):
        found.update(repr(sorted(repr(plain_form(item)) for item in value)).encode())
    elif isinstance(value, torch.Tensor):
        _add_tensor(found, value)
    elif hasattr(type(value), "__array__"):
        # an object whose conversion fails is hashed by the name of its type
        with contextlib.suppress(TypeError, ValueError):
            _add_array(found, np.asarray(value), (*above, id(value)))
    elif callable(value) and isinstance(getattr(value, "__qualname__", None), str):
        found.update(f"{value.__module__}.{value.__qualname__}".encode())
    return {"digest": f"{name} sha256:{found.hexdigest()}"}


def _add_tensor(found: Any, value: torch.Tensor) -> None:
    """Hash a tensor; if it is not dense, only its dtype and shape."""
    found.update(f"{value.dtype} {tuple(value.shape)}".encode())
    if value.layout == torch.strided and not value.is_meta:
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _add_array(found: Any, array: Any, above: tuple[int, ...]) -> None:
    """Hash an array in C order by chunks; chunks that are not contiguous are copied."""
    found.update(f"{array.dtype!r} {array.shape}".encode())
    if array.dtype.hasobject:
        found.update(repr(_plain(array.tolist(), above)).encode())
        return
    for chunk in np.nditer(array, ["external_loop", "buffered", "zerosize_ok"], order="C", buffersize=CHUNK_ITEMS):
        found.update(np.ascontiguousarray(chunk).view(np.uint8))
