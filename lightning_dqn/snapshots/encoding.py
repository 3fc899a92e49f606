"""Writes everything reachable from an environment's attributes down as plain values: the way into a snapshot.

A snapshot is a table of nodes and one block of memory. What a step can change in place (lists, arrays, generators,
objects) is a node and is referred to by its index, so that two names for one list stay two names for one list. What
can't be changed in place is written where it is used:

    value := null | bool | number | string | [index] | [tag, ...]
    node  := [tag, ...]

The table is JSON: quick to write and to read, and nothing but plain values can be in it.
Objects are not made anew at a restore: their attributes are put into the object at the same place in an environment
made in the same way. So a snapshot names types, to compare them, but never brings one to life.
Attributes that a class names in `not_in_snapshots` stay out; its method `catch_up` puts them right after a restore.
"""

import json
import logging
import sys
from collections import OrderedDict, deque
from enum import Enum
from random import Random
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.lib import format as npy_format

VERSION = 1
SCALARS = (type(None), bool, int, float, str)
CONTAINERS: dict[type, str] = {list: "list", set: "set", deque: "deque", dict: "dict", OrderedDict: "ordered_dict"}
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
# where classes keep what they were made with
_ARGUMENTS = {"_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "env_fns"}


class CannotSnapshotError(Exception):
    """An environment holds something whose state can't be written down as plain values."""


def snapshot(envs: VectorEnv[Any, Any, Any]) -> dict[str, Any]:
    """All that the next steps of environments depend on, as values that `torch.load(weights_only=True)` accepts.

    It is a copy: later steps do not change it. Reads attributes only and calls nothing of the environment, so the
    environments go on as if it had not been taken. What is not an attribute (a global variable, memory of a library in
    C) is not in it; `prove` finds out whether that matters.

    Args:
        envs: the environments; what they are wrapped in is part of it.

    Raises:
        CannotSnapshotError: if an attribute holds what can't be written down; it names the attribute and its type.
    """
    encoder = _Encoder(envs, text_arguments(envs))
    memory = np.frombuffer(encoder.memory, dtype=np.uint8).copy()
    return {
        "version": VERSION,
        "num_envs": envs.num_envs,
        "nodes": json.dumps(encoder.nodes, separators=(",", ":")),
        "memory": torch.from_numpy(memory),
    }


def text_arguments(envs: VectorEnv[Any, Any, Any]) -> list[str]:
    """All strings among the arguments that environments were made with: each may be a secret, which no file must hold.

    Another one made in the same way has the same at the same index.
    """
    texts, waiting = [], deque([envs.spec.kwargs if envs.spec else {}])
    while waiting:
        value: Any = waiting.popleft()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
    return texts


def type_name(value: object) -> str:
    """The full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def constant_name(value: object) -> str | None:
    """What a value is called that has no state of its own, such as a class or a module; None for all others."""
    if isinstance(value, (ModuleType, logging.Logger)):
        return f"{type(value).__name__} {value.__name__ if isinstance(value, ModuleType) else value.name}"
    if isinstance(value, (np.dtype, np.ufunc, range, slice)) or value is Ellipsis:
        return repr(value)
    if type(value) is object:
        return "a bare object"
    if not callable(value):
        return None
    name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    in_module = isinstance(name, str) and getattr(sys.modules.get(str(module)), name, None) is value
    return f"{module}.{name}" if in_module or isinstance(value, type) else None


def is_argument(owner: object, name: str, value: object) -> bool:
    """Whether an attribute stays out: another owner made in the same way has it too, or its `catch_up` sees to it."""
    in_space = type(owner).__module__.startswith("gymnasium.spaces.") and isinstance(value, (np.ndarray, frozenset))
    own = name in getattr(type(owner), "not_in_snapshots", ())
    return in_space or own or name in _ARGUMENTS or isinstance(value, EnvSpec)


class _Encoder:
    """One walk over everything reachable from `root`, breadth first, so that depth costs no stack."""

    def __init__(self, root: object, text_arguments: list[str]) -> None:
        self.nodes: list[list[Any]] = []
        self.memory = bytearray()
        self._arguments = {text: i for i, text in reversed([*enumerate(text_arguments)])}
        self._index: dict[int, int] = {}
        self._blocks: dict[int, tuple[int, int]] = {}
        # an id is only good for as long as its object lives, and some are made on the way
        self._alive: list[object] = []
        self._waiting: deque[tuple[object, str]] = deque()
        self._value(root, type(root).__name__)
        while self._waiting:
            value, path = self._waiting.popleft()
            self.nodes.append(self._node(value, path))

    def _value(self, value: Any, path: str) -> Any:
        """A value as it is written where it is used; nodes that are new are put on the list of those to come."""
        kind = type(value)
        if kind in SCALARS:
            return ["argument", self._arguments[value]] if kind is str and value in self._arguments else value
        if kind in (tuple, frozenset, bytes, complex) or _is_numpy_scalar(value):
            return self._constant(value, path)
        if kind is MethodType and getattr(value.__self__, value.__name__, None) == value:
            return ["method", self._value(value.__self__, path), value.__name__]
        if id(value) not in self._index:
            self._index[id(value)] = len(self._index)
            self._alive.append(value)
            self._waiting.append((value, path))
        return [self._index[id(value)]]

    def _constant(self, value: Any, path: str) -> list[Any]:
        """What can't be changed in place; what is in it may be."""
        if type(value) is tuple:
            return ["tuple", *[self._value(item, path) for item in value]]
        if type(value) is frozenset:
            return ["frozenset", *[self._value(item, path) for item in _in_order(value, path)]]
        if type(value) is bytes:
            return ["bytes", self._store(value)]
        if type(value) is complex:
            return ["complex", value.real, value.imag]
        array = np.asarray(value)
        return ["scalar", self._store(array.tobytes()), _describe_dtype(array.dtype, path)]

    def _node(self, value: Any, path: str) -> list[Any]:
        """What can be changed in place, with all that is in it."""
        kind = type(value)
        if kind in CONTAINERS:
            return self._container(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        if isinstance(value, (np.random.Generator, np.random.BitGenerator, np.random.RandomState, Random)):
            return self._random(value, path)
        if isinstance(value, Enum) and value.name in type(value).__members__:
            return ["enum", type_name(value), value.name]
        name = constant_name(value)
        if name is not None:
            return ["constant", name]
        return self._function(value, path) if kind is FunctionType else self._object(value, path)

    def _container(self, value: Any, path: str) -> list[Any]:
        tag = CONTAINERS[type(value)]
        if isinstance(value, dict):
            pairs = value.items()
            return [tag, *[self._value(part, f"{path}[{k!r}]") for k, item in pairs for part in (k, item)]]
        if isinstance(value, set):
            return [tag, *[self._value(item, path) for item in _in_order(value, path)]]
        items = [self._value(item, f"{path}[{i}]") for i, item in enumerate(value)]
        return [tag, value.maxlen, *items] if isinstance(value, deque) else [tag, *items]

    def _array(self, value: np.ndarray[Any, Any], path: str) -> list[Any]:
        """Where the array lies in its block of memory; arrays that share memory share a block."""
        if value.dtype == object:
            if value.base is not None:
                raise _refusal(path, value, "a view of an array of objects")
            return ["objects", value.shape, *[self._value(item, path) for item in value.flat]]
        owner = value
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if owner.base is not None and owner.flags.writeable:
            raise _refusal(path, value, f"memory that a {type_name(owner.base)} owns and may change")
        if id(owner) not in self._blocks:
            steps = [(n - 1) * stride for n, stride in zip(owner.shape, owner.strides, strict=True)]
            if owner.size and (min(steps, default=0) < 0 or sum(steps) + owner.itemsize != owner.nbytes):
                raise _refusal(path, value, "an array with gaps in its memory")
            self._alive.append(owner)
            self._blocks[id(owner)] = self._store(owner.ravel(order="K").tobytes())
        offset = value.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        layout = (_describe_dtype(value.dtype, path), value.shape, value.strides, value.flags.writeable)
        return ["array", self._blocks[id(owner)], offset, layout]

    def _random(self, value: Any, path: str) -> list[Any]:
        """A generator of random numbers; two NumPy generators may draw from one bit generator."""
        if type(value) is np.random.Generator:
            return ["generator", self._value(value.bit_generator, path)]
        if type(value) is np.random.RandomState:
            state = value.get_state(legacy=False)
            return ["random_state", state["bit_generator"], self._value(state, path)]
        if type(value) is Random:
            return ["random", self._value(value.getstate(), path)]
        name = type(value).__name__
        if name not in BIT_GENERATORS or type(value) is not getattr(np.random, name):
            raise _refusal(path, value)
        # numpy's spawn() counts its children there
        seeds = value.seed_seq
        spawning = None
        if type(seeds) is np.random.SeedSequence:
            words = seeds.entropy
            entropy = words if isinstance(words, int) else [int(word) for word in words or ()]
            spawning = [entropy, seeds.spawn_key, seeds.pool_size, seeds.n_children_spawned]
        return ["bit_generator", name, spawning, self._value(value.state, path)]

    def _function(self, value: FunctionType, path: str) -> list[Any]:
        """A function made on the way, with its attributes, its defaults, and the variables it closes over."""
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            raise _refusal(path, value, "a function with a variable that is not set yet") from None
        contents = [vars(value), value.__defaults__, value.__kwdefaults__, *cells]
        names = ["__dict__", "__defaults__", "__kwdefaults__", *value.__code__.co_freevars]
        parts = [self._value(part, f"{path}.{name}") for name, part in zip(names, contents, strict=True)]
        return ["function", f"{value.__module__}.{value.__qualname__}", *parts]

    def _object(self, value: Any, path: str) -> list[Any]:
        """An object by its attributes, which must be all there is to it."""
        if isinstance(value, AsyncVectorEnv):
            raise CannotSnapshotError(
                f"{path} runs its environments in other processes, out of a snapshot's reach; use vectorization=sync"
            )
        if not _is_its_attributes(value):
            raise _refusal(path, value)
        attributes = {k: item for k, item in vars(value).items() if not is_argument(value, k, item)}
        encoded = [part for k, item in attributes.items() for part in (k, self._value(item, f"{path}.{k}"))]
        return ["object", type_name(value), *encoded]

    def _store(self, content: bytes) -> tuple[int, int]:
        """Append to the memory; where it begins and how many bytes it has."""
        begin = len(self.memory)
        self.memory += content
        return begin, len(content)


def _is_numpy_scalar(value: object) -> bool:
    """Whether it is one of NumPy's own; a record of a structured array is a view of it, and no constant."""
    return (
        isinstance(value, np.generic)
        and type(value) not in (np.void, np.object_)
        and (np.asarray(value).dtype.type is type(value))
    )


def _is_its_attributes(value: object) -> bool:
    """Whether an object has no room for state but its attributes: no slots, nothing that code in C keeps there."""
    kind = type(value)
    pointers = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    size = object.__basicsize__ + pointers * np.dtype(np.intp).itemsize
    return hasattr(value, "__dict__") and kind.__itemsize__ == 0 and kind.__basicsize__ <= size


def _describe_dtype(dtype: np.dtype[Any], path: str) -> str:
    """A dtype in the words of NumPy's own file format."""
    descr = npy_format.dtype_to_descr(dtype)
    if dtype.hasobject or npy_format.descr_to_dtype(descr) != dtype:
        raise CannotSnapshotError(f"{path} has the dtype {dtype}, which can't be written down; use a numeric one")
    return descr if isinstance(descr, str) else repr(descr)


def _in_order(value: Any, path: str) -> list[Any]:
    """The items of a set, if a set made of them in this order is walked in this order again, in any process."""
    items = list(value)
    if len(items) > 1 and not all(map(_hashes_the_same, items)):
        raise _refusal(path, value, "a set whose order changes from process to process")
    if list(type(value)(items)) != items:
        raise _refusal(path, value, "a set whose order depends on how it came about")
    return items


def _hashes_the_same(item: object) -> bool:
    """Whether the hash is the same in every process: that of strings is salted, that of objects is their address."""
    if type(item) is tuple:
        return all(map(_hashes_the_same, item))
    return isinstance(item, (int, float, complex, np.number, np.bool_)) and not isinstance(item, Enum)


def _refusal(path: str, value: object, what: str = "state that is not in its attributes") -> CannotSnapshotError:
    return CannotSnapshotError(
        f"{path} is a {type_name(value)}: {what} can't be written into a snapshot; "
        "keep what changes in plain values, NumPy arrays and NumPy generators"
    )
