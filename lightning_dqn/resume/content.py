"""Checks of the values in a checkpoint before any of them is used: a file may be damaged or forged.

Every function takes the name of the value in the checkpoint, for its error message.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# key of the entry that describes the file format, and the version of that format
ENTRY, SCHEMA = "lightning_dqn", 2
# entries that contain classes, which Lightning would import and call
HYPER_PARAMETERS = ("hyper_parameters", "hparams_name", "hparams_type", "datamodule_hyper_parameters")
# counters of env steps, updates and episodes are far smaller, and sums of a few of them fit into int64
MAX_COUNT = 2**53
# largest nesting depth of plain values
MAX_DEPTH = 32


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; the message names the file or the value, and the remedy."""


def invalid(name: str, problem: str) -> NoReturn:
    """Reject a value of a checkpoint.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(f"{name} in the checkpoint {problem}: it is damaged or not of this package; use another one")


def check_header(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Check the version of a checkpoint and the entries that Lightning does not check; return the entry of the format.

    Raises:
        CheckpointError: if it has another version, or an entry that Lightning would call.
    """
    if ENTRY not in checkpoint:
        raise CheckpointError(f"{ENTRY} is missing: this is no checkpoint of this package; use another one")
    entry = check_dict(checkpoint[ENTRY], ENTRY, ("schema",))
    schema = check_int(entry["schema"], f"{ENTRY}.schema")
    if schema < SCHEMA:
        raise CheckpointError("written by lightning_dqn 0.1, whose checkpoints can't be read any more; train anew")
    if schema > SCHEMA:
        raise CheckpointError(
            f"written in schema {schema} by a newer lightning_dqn, this one reads up to {SCHEMA}; upgrade it"
        )
    for name in HYPER_PARAMETERS:
        if name in checkpoint:
            invalid(name, "is not allowed: Lightning would call what it names")
    lightning = checkpoint.get("pytorch-lightning_version", "2.6")
    if type(lightning) is not str or not re.match(r"[2-9]\.\d{1,3}(\.|$)", lightning):
        invalid("pytorch-lightning_version", f"is {_short(lightning)}, not a version of Lightning 2")
    return entry


def check_dict(value: Any, name: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Check that a value is a dict with all of these keys, and return it.

    Raises:
        CheckpointError: if it is not a dict, or a key is missing.
    """
    if type(value) not in (dict, OrderedDict):
        invalid(name, f"is a {type(value).__name__}, not a dict")
    for key in keys:
        if key not in value:
            invalid(f"{name}.{key}" if name else key, "is missing")
    mapping: dict[str, Any] = value
    return mapping


def check_int(value: Any, name: str, low: int = 0, high: int = MAX_COUNT) -> int:
    """Check that a value is an int in [low, high], and return it.

    Raises:
        CheckpointError: if it is anything else.
    """
    if type(value) is not int or not low <= value <= high:
        invalid(name, f"is {_short(value)}, not an int in [{low}, {high}]")
    return value


def check_float(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Check that a value is a finite number in [low, high], and return it as a float.

    Raises:
        CheckpointError: if it is anything else.
    """
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        invalid(name, f"is {_short(value)}, not a finite number in [{low}, {high}]")
    return float(value)


def check_bool(value: Any, name: str) -> bool:
    """Check that a value is a bool, and return it.

    Raises:
        CheckpointError: if it is anything else.
    """
    if type(value) is not bool:
        invalid(name, f"is {_short(value)}, not a bool")
    return value


def check_dense(value: Tensor, name: str) -> None:
    """Check that a tensor is strided, materialized, and has storage for all of its elements.

    An expanded tensor of a few bytes can have any size.

    Raises:
        CheckpointError: if it is not.
    """
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        invalid(name, "is not a dense tensor")
    if value.is_conj() or value.is_neg():
        invalid(name, "is a view that is yet to be computed")
    if (value.storage_offset() + value.numel()) * value.element_size() > value.untyped_storage().nbytes():
        invalid(name, "has fewer values than elements")


def check_tensor(
    value: Any,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    shape: Sequence[int | None] | None = None,
    finite: bool = True,
) -> Tensor:
    """Check that a value is a dense tensor of numbers, and return it.

    Args:
        value: the value to check.
        name: name of the value in the checkpoint.
        dtype: required dtype; None for any.
        shape: required shape; None for any, and None in it for any size of a dimension.
        finite: whether NaN and infinity are rejected.

    Raises:
        CheckpointError: if it is anything else.
    """
    if type(value) not in (Tensor, nn.Parameter):
        invalid(name, f"is a {type(value).__name__}, not a tensor")
    check_dense(value, name)
    if dtype is not None and value.dtype != dtype:
        invalid(name, f"has dtype {value.dtype}, not {dtype}")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True)
        )
        if not fits:
            invalid(name, f"has shape {tuple(value.shape)}, not {tuple('any' if s is None else s for s in shape)}")
    if finite and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        invalid(name, "is not finite")
    tensor: Tensor = value
    return tensor


def check_array(value: Any, name: str, *, dtype: np.dtype[Any], shape: Sequence[int | None]) -> NDArray[Any]:
    """Check that a value is a tensor of finite numbers; return a copy as an array of the same memory layout.

    Args:
        value: the value to check.
        name: name of the value in the checkpoint.
        dtype: required dtype.
        shape: required shape; None in it for any size of a dimension.

    Raises:
        CheckpointError: if it is anything else.
    """
    tensor = check_tensor(value, name, dtype=torch.from_numpy(np.zeros(0, dtype)).dtype, shape=shape)
    array: NDArray[Any] = tensor.detach().cpu().numpy().copy(order="K")
    return array


def check_counts(value: Any, name: str, *, shape: Sequence[int | None], high: int = MAX_COUNT) -> NDArray[np.int64]:
    """Check that a value is an int64 tensor of counts in [0, high]; return a copy as an array.

    Raises:
        CheckpointError: if it is anything else.
    """
    counts: NDArray[np.int64] = check_array(value, name, dtype=np.dtype(np.int64), shape=shape)
    if counts.size and not 0 <= int(counts.min()) <= int(counts.max()) <= high:
        invalid(name, f"has values outside of [0, {high}]")
    return counts


def check_plain(value: Any, name: str, *, classes: bool = False, depth: int = 0) -> None:
    """Check that a value is None, a bool, int, float or str, or a list, tuple or dict of these.

    Args:
        value: the value to check.
        name: name of the value in the checkpoint.
        classes: whether it may describe classes.
        depth: number of containers around it.

    Raises:
        CheckpointError: naming the part that is of another type.
    """
    if depth > MAX_DEPTH:
        invalid(name[:120], "is nested too deeply")
    if type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{name}[{i}]", classes=classes, depth=depth + 1)
    elif type(value) is dict:
        if "class_path" in value and not classes:
            invalid(name, "is a class, which is not allowed there")
        for key, item in value.items():
            check_plain(key, f"{name} (a key)", classes=classes, depth=depth + 1)
            check_plain(item, f"{name}.{key}", classes=classes, depth=depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str):
        invalid(name[:120], f"is a {type(value).__name__}, not a plain value")


def check_like(value: Any, example: Any, name: str, *, loose: bool = False) -> None:
    """Check that a value has the keys, lengths, types, dtypes and shapes of an example, and no negative numbers.

    Args:
        value: the value to check.
        example: value with the required structure.
        name: name of the value in the checkpoint.
        loose: whether numbers may be of any type and sign, sequences lists or tuples, and flags None.

    Raises:
        CheckpointError: naming the first place that differs.
    """
    if isinstance(example, Mapping):
        check_dict(value, name)
        for key in [*example.keys(), *value.keys()]:
            if key not in value or key not in example:
                invalid(f"{name}.{key}", "is missing" if key not in value else "is unknown")
            check_like(value[key], example[key], f"{name}.{key}", loose=loose)
    elif isinstance(example, (list, tuple)):
        if type(value) not in ((list, tuple) if loose else (type(example),)) or len(value) != len(example):
            invalid(name, f"is not a {type(example).__name__} of length {len(example)}")
        for i, (item, other) in enumerate(zip(value, example, strict=True)):
            check_like(item, other, f"{name}[{i}]", loose=loose)
    elif isinstance(example, Tensor):
        check_tensor(value, name, dtype=None if loose else example.dtype, shape=example.shape)
    elif isinstance(example, bool) or (loose and example is None):
        if not loose or value is not None:
            check_bool(value, name)
    elif isinstance(example, int) and not loose:
        check_int(value, name)
    elif isinstance(example, (int, float)):
        check_float(value, name)
    elif type(value) is not type(example):
        invalid(name, f"is a {type(value).__name__}, not a {type(example).__name__}")


def check_generator(value: Any, name: str) -> dict[str, Any]:
    """Check that a value is the `bit_generator.state` of a `numpy.random.Generator` with PCG64, and return it.

    Raises:
        CheckpointError: if it is anything else.
    """
    state = check_dict(value, name, ("bit_generator", "state", "has_uint32", "uinteger"))
    if state["bit_generator"] != "PCG64":
        invalid(f"{name}.bit_generator", f"is {_short(state['bit_generator'])}, not PCG64")
    inner = check_dict(state["state"], f"{name}.state", ("state", "inc"))
    for key in ("state", "inc"):
        check_int(inner[key], f"{name}.state.{key}", 0, 2**128 - 1)
    check_int(state["has_uint32"], f"{name}.has_uint32", 0, 1)
    check_int(state["uinteger"], f"{name}.uinteger", 0, 2**32 - 1)
    return state


def generator_from(value: Any, name: str) -> np.random.Generator:
    """Create a generator from a state that `check_generator` accepts.

    Raises:
        CheckpointError: if the state is invalid.
    """
    generator = np.random.default_rng(0)
    generator.bit_generator.state = check_generator(value, name)
    return generator


def _short(value: Any) -> str:
    """A value in at most 40 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, (int, float, str, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
