"""Puts a snapshot back into environments made in the same way: the way out of it.

First every object of the snapshot is paired with the one at the same place in the environments; only when all are
found is anything written.
"""

import ast
import json
from collections import deque
from enum import Enum
from random import Random
from types import FunctionType
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.lib import format as npy_format

from lightning_dqn.snapshots.encoding import (
    BIT_GENERATORS,
    CONTAINERS,
    VERSION,
    constant_name,
    is_argument,
    text_arguments,
    type_name,
)

_MISSING = object()
# what a snapshot names but can't make
_LASTING = ("object", "function", "constant", "enum")
_CONSTANTS: dict[str, type] = {"tuple": tuple, "frozenset": frozenset}
_SHELLS = {tag: kind for kind, tag in CONTAINERS.items()}


class CannotRestoreError(ValueError):
    """A snapshot was taken of other environments than those it is to be put into."""


def restore(envs: VectorEnv[Any, Any, Any], state: dict[str, Any]) -> None:
    """Put environments where those of a snapshot were: the next steps give the same to the bit.

    Args:
        envs: made in the same way as those the snapshot is of; they are reset first, since many make some of their
            parts only then.
        state: what `snapshot` gave.

    Raises:
        CannotRestoreError: if they were made in another way; they have to be reset then.
    """
    if state["version"] != VERSION:
        raise CannotRestoreError(
            f"this snapshot of environments has version {state['version']}, this release reads {VERSION}: "
            "resume with the release that wrote it"
        )
    if state["num_envs"] != envs.num_envs:
        raise CannotRestoreError(
            f"num_envs={envs.num_envs}: the snapshot is of {state['num_envs']} environments; make as many"
        )
    envs.reset(seed=0)
    _Restorer(state, envs).fill()


class _Restorer:
    """One snapshot on its way into environments; `_made` is what its nodes have become, by index."""

    def __init__(self, state: dict[str, Any], envs: VectorEnv[Any, Any, Any]) -> None:
        self._nodes: list[list[Any]] = json.loads(state["nodes"])
        self._memory = state["memory"].numpy()
        self._blocks: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        self._arguments = text_arguments(envs)
        self._made: dict[int, Any] = {}
        self._taken: set[int] = set()
        self._paired: dict[int, bool] = {}
        self._waiting: deque[tuple[Any, Any, str]] = deque([([0], envs, type(envs).__name__)])
        self._refusals: dict[int, str] = {}
        while self._waiting:
            self._pair(*self._waiting.popleft())
        for index, (tag, *content) in enumerate(self._nodes):
            if tag in _LASTING and index not in self._made:
                nowhere = f"the snapshot has {content[0]} in a set or as a key, where it can't be paired"
                raise CannotRestoreError(self._refusals.get(index, nowhere))

    def _pair(self, value: Any, twin: Any, path: str) -> None:
        """Find what the environments have where the snapshot has `value`, and so for all that is in it."""
        if type(value) is not list:
            return
        if value[0] == "tuple":
            twins = twin if type(twin) is tuple else ()
            self._pair_items(value[1:], dict(enumerate(twins)), path)
        elif value[0] == "method":
            self._waiting.append((value[1], getattr(twin, "__self__", _MISSING), path))
        elif type(value[0]) is int:
            self._pair_node(value[0], twin, path)

    def _pair_node(self, index: int, twin: Any, path: str) -> None:
        tag, *content = self._nodes[index]
        if tag in _LASTING:
            if index not in self._made:
                self._pair_lasting(index, twin, path)
        # once more where there is something to pair with at last
        elif tag in _SHELLS and not self._paired.get(index, False):
            fits = type(twin) is _SHELLS[tag]
            if fits or index not in self._paired:
                self._paired[index] = fits
                self._pair_container(tag, content, twin if fits else (), path)

    def _pair_container(self, tag: str, content: list[Any], twin: Any, path: str) -> None:
        if tag.endswith("dict"):
            for key, value in zip(map(self._plain, content[::2]), content[1::2], strict=True):
                self._waiting.append((value, twin.get(key, _MISSING) if twin else _MISSING, f"{path}[{key!r}]"))
        elif tag != "set":
            values = content[1:] if tag == "deque" else content
            self._pair_items(values, dict(enumerate(twin)), path)

    def _pair_items(self, values: Any, twins: dict[int, Any], path: str) -> None:
        for i, value in enumerate(values):
            self._waiting.append((value, twins.get(i, _MISSING), f"{path}[{i}]"))

    def _plain(self, key: Any) -> Any:
        """A key without references, or nothing that is ever looked up."""
        try:
            return self._decode(key)
        except KeyError:
            return _MISSING

    def _pair_lasting(self, index: int, twin: Any, path: str) -> None:
        """Take what the environments have for an object, function or constant that a snapshot can't make itself."""
        tag, name, *content = self._nodes[index]
        if tag == "constant":
            found = name == constant_name(twin)
        elif tag == "enum":
            found = isinstance(twin, Enum) and type_name(twin) == name
            twin = getattr(type(twin), content[0]) if found else twin
        elif tag == "function":
            found = isinstance(twin, FunctionType) and f"{twin.__module__}.{twin.__qualname__}" == name
        else:
            found = type_name(twin) == name
        if not found or (tag in ("object", "function") and id(twin) in self._taken):
            has = "nothing" if twin is _MISSING else "one in use elsewhere" if found else f"a {type_name(twin)}"
            what = name if tag != "enum" else f"{name}.{content[0]}"
            self._refusals[index] = f"{path}: the snapshot has {what} there, these environments have {has}; " + (
                "make them with the arguments and wrappers that the snapshot was taken with"
            )
            return
        self._made[index] = twin
        self._taken.add(id(twin))
        if tag == "function":
            cells = [cell.cell_contents for cell in twin.__closure__ or ()]
            parts = [vars(twin), twin.__defaults__, twin.__kwdefaults__, *cells]
            self._pair_items(content, dict(enumerate(parts)), path)
        elif tag == "object":
            for key, value in zip(content[::2], content[1::2], strict=True):
                self._waiting.append((value, vars(twin).get(key, _MISSING), f"{path}.{key}"))

    def fill(self) -> None:
        """Make all that a snapshot can make, then write everything into its place."""
        for index in range(len(self._nodes)):
            self._make(index)
        for index in range(len(self._nodes)):
            self._fill_node(index)
        # their states are nodes too, and must be whole by now
        for index, (tag, *content) in enumerate(self._nodes):
            if tag == "bit_generator":
                self._made[index].state = self._decode(content[2])
            elif tag == "random_state":
                self._made[index].set_state(self._decode(content[1]))
            elif tag == "random":
                self._made[index].setstate(self._decode(content[0]))
        self._catch_up()

    def _catch_up(self) -> None:
        """Let objects see to those of their attributes that their class names in `not_in_snapshots`."""
        for index, (tag, *_) in enumerate(self._nodes):
            made = self._made[index]
            if tag == "object" and getattr(type(made), "not_in_snapshots", ()):
                try:
                    made.catch_up()
                except ValueError as error:
                    raise CannotRestoreError(f"{type_name(made)}: {error}") from error

    def _make(self, index: int) -> Any:
        """The thing a node stands for, still empty if it is something to be filled."""
        if index not in self._made:
            tag, *content = self._nodes[index]
            if tag == "array":
                self._made[index] = self._array(*content)
            elif tag == "objects":
                self._made[index] = np.empty(content[0], dtype=object)
            elif tag == "generator":
                self._made[index] = np.random.Generator(self._make(content[0][0]))
            elif tag == "random_state":
                self._made[index] = np.random.RandomState(_bit_generator(content[0]))
            elif tag == "bit_generator":
                self._made[index] = _bit_generator(content[0], content[1])
            elif tag == "random":
                self._made[index] = Random()
            else:
                self._made[index] = deque(maxlen=content[0]) if tag == "deque" else _SHELLS[tag]()
        return self._made[index]

    def _fill_node(self, index: int) -> None:
        tag, *content = self._nodes[index]
        made = self._made[index]
        if tag in ("list", "deque"):
            made.extend(map(self._decode, content[1:] if tag == "deque" else content))
        elif tag == "set":
            made.update(map(self._decode, content))
        elif tag in ("dict", "ordered_dict"):
            values = list(map(self._decode, content))
            made.update(zip(values[::2], values[1::2], strict=True))
        elif tag == "objects":
            for i, value in zip(np.ndindex(made.shape), content[1:], strict=True):
                made[i] = self._decode(value)
        elif tag == "function":
            made.__dict__, made.__defaults__, made.__kwdefaults__, *cells = map(self._decode, content[1:])
            for cell, value in zip(made.__closure__ or (), cells, strict=True):
                cell.cell_contents = value
        elif tag == "object":
            attributes = dict(zip(content[1::2], map(self._decode, content[2::2]), strict=True))
            for name in [k for k, v in vars(made).items() if k not in attributes and not is_argument(made, k, v)]:
                del vars(made)[name]
            # past setters and frozen dataclasses: these are the values that lay there
            vars(made).update(attributes)

    def _decode(self, value: Any) -> Any:
        """A value from the way it is written where it is used; the nodes must have been made."""
        if type(value) is not list:
            return value
        tag, *content = value
        if type(tag) is int:
            return self._made[tag]
        if tag in ("tuple", "frozenset"):
            return _CONSTANTS[tag](map(self._decode, content))
        if tag == "method":
            return getattr(self._decode(content[0]), content[1])
        return self._arguments[content[0]] if tag == "argument" else self._decode_number(tag, content)

    def _decode_number(self, tag: str, content: list[Any]) -> Any:
        """A complex number, or what lies in the memory as bytes."""
        if tag == "complex":
            return complex(*content)
        begin, size = content[0]
        stored = self._memory[begin : begin + size].tobytes()
        return stored if tag == "bytes" else np.frombuffer(stored, _read_dtype(content[1]))[0]

    def _array(self, block: list[int], offset: int, layout: list[Any]) -> np.ndarray[Any, Any]:
        """An array in a block of memory of its own, or in that of the arrays it shares it with."""
        descr, shape, strides, writeable = layout
        begin, size = block
        if (begin, size) not in self._blocks:
            self._blocks[begin, size] = self._memory[begin : begin + size].copy()
        array = np.ndarray(shape, _read_dtype(descr), self._blocks[begin, size], offset, strides)
        array.flags.writeable = writeable
        return array


def _read_dtype(descr: str) -> np.dtype[Any]:
    """The dtype of stored memory; bytes from a file must never be taken for the addresses of objects."""
    words: Any = ast.literal_eval(descr) if descr[0] in "[(" else descr
    dtype = npy_format.descr_to_dtype(words)
    if dtype.hasobject:
        raise CannotRestoreError(f"this snapshot has {dtype} as plain memory: it is damaged or forged, use another one")
    return dtype


def _bit_generator(name: str, spawning: list[Any] | None = None) -> np.random.BitGenerator:
    """A bit generator; what it has been seeded with matters only to those that `spawn` from it."""
    if name not in BIT_GENERATORS:
        raise CannotRestoreError(f"this snapshot has a bit generator {name}; NumPy has {', '.join(BIT_GENERATORS)}")
    seeds = None
    if spawning is not None:
        entropy, spawn_key, pool_size, children = spawning
        seeds = np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=children)
    made: np.random.BitGenerator = getattr(np.random, name)(seeds)
    return made
