"""Storage of observations in RAM, in a memory-mapped file or on an accelerator.

Legend: N envs, M rows to read. A row is slot * N + environment.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# the number of earlier frames is stored in a byte
MOST_FRAMES = 256


def stored_form(observation_space: gym.Space[Any], frame_stack: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a stored observation: the newest frame of a stack, and float32 for float64.

    Args:
        observation_space: space of one observation.
        frame_stack: frames in it, k.

    Raises:
        ValueError: if frame_stack is out of range, or is not the first axis of the observations.
    """
    shape = tuple(observation_space.shape or ())
    if not 1 <= frame_stack <= MOST_FRAMES:
        raise ValueError(f"frame_stack={frame_stack}: must be in [1, {MOST_FRAMES}]")
    if frame_stack > 1 and shape[:1] != (frame_stack,):
        raise ValueError(
            f"frame_stack={frame_stack}: observations have shape {shape}, ({frame_stack}, ...) is needed; stack "
            f'frames by FrameStackObservation(env, {frame_stack}, padding_type="zero"), or use 1'
        )
    dtype = np.dtype(np.float32 if observation_space.dtype == np.float64 else observation_space.dtype)
    return shape[1:] if frame_stack > 1 else shape, dtype


class Storage(Protocol):
    """Stores (slots, N, ...) observations, initially zeros.

    Attributes:
        shape: (slots, N, ...).
        dtype: dtype of the observations.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def write(self, slot: int, observation: NDArray[Any]) -> None:
        """Write (N, ...) observations to a slot."""

    def take(self, rows: NDArray[np.int64], lead: tuple[int, ...], blank: NDArray[np.int64] | None = None) -> Tensor:
        """Copies of (M,) rows, modulo the number of rows, as (*lead, ...); zeros at the positions `blank`."""

    def state(self, used: int) -> Tensor:
        """The first slots as a CPU tensor, (used, N, ...): a view for storage in RAM, else a copy."""

    def load(self, stored: Tensor, start: int = 0) -> None:
        """Load (T, N, ...) observations from `state`, beginning at slot `start`."""


class ArrayStorage:
    """Stores observations in RAM or in a memory-mapped file.

    The file is an unlinked temporary file: private to this process and freed on exit, even if the process is killed. It
    is sparse: it uses disk space only where it is written.

    Args:
        shape: (slots, N, ...).
        dtype: dtype of the observations.
        folder: directory of the file; None for RAM.

    Raises:
        ValueError: if the folder does not exist.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path | None = None) -> None:
        self.shape, self.dtype = shape, dtype
        self._form = shape[2:]
        # zeros take no memory until they are written
        self._slots: NDArray[Any] = (
            np.zeros(shape, dtype) if folder is None else _map_unlinked_file(shape, dtype, folder)
        )
        # a view by row, read with numpy, which has less overhead per call than torch
        self._rows = self._slots.reshape(-1, *shape[2:])

    def write(self, slot: int, observation: NDArray[Any]) -> None:
        """Write (N, ...) observations to a slot."""
        self._slots[slot] = observation

    def take(self, rows: NDArray[np.int64], lead: tuple[int, ...], blank: NDArray[np.int64] | None = None) -> Tensor:
        """Copies of (M,) rows, modulo the number of rows, as (*lead, ...); zeros at the positions `blank`."""
        taken = self._rows.take(rows, 0, mode="wrap")
        if blank is not None:
            taken[blank] = 0
        return torch.from_numpy(taken.reshape(lead + self._form))

    def state(self, used: int) -> Tensor:
        """The first slots, (used, N, ...), as a view."""
        return torch.from_numpy(self._slots[:used])

    def load(self, stored: Tensor, start: int = 0) -> None:
        """Load (T, N, ...) observations from `state`, beginning at slot `start`."""
        self._slots[start : start + len(stored)] = stored.numpy()


def check_folder(folder: Path) -> None:
    """Check that a folder exists.

    Raises:
        ValueError: if it does not.
    """
    if not folder.is_dir():
        raise ValueError(f"memory_folder={folder}: no such folder; create it, or choose another")


def _map_unlinked_file(shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path) -> NDArray[Any]:
    check_folder(folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        # a plain array of the same memory, since the indexing of memmap is slower
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


class TensorStorage:
    """Stores observations on a device and gathers rows there, so batches need no transfer.

    Args:
        shape: (slots, N, ...).
        dtype: dtype of the observations.
        device: device of the storage.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        self._form = shape[2:]
        self._slots = torch.zeros(shape, dtype=torch.from_numpy(np.zeros(0, dtype)).dtype, device=device)
        self._rows = self._slots.view(math.prod(shape[:2]), *shape[2:])
        # a copy from pageable memory has read its source when it returns, so it need not wait for running updates
        self._at_once = device.type == "cuda"

    def write(self, slot: int, observation: NDArray[Any]) -> None:
        """Write (N, ...) observations to a slot."""
        # a copy, since the array may be read-only or a buffer of the environment
        self._slots[slot].copy_(torch.from_numpy(np.array(observation, self.dtype)), non_blocking=self._at_once)

    def take(self, rows: NDArray[np.int64], lead: tuple[int, ...], blank: NDArray[np.int64] | None = None) -> Tensor:
        """Copies of (M,) rows, modulo the number of rows, as (*lead, ...); zeros at the positions `blank`."""
        taken = self._rows.index_select(0, self._send(rows % len(self._rows)))
        if blank is not None:
            taken.index_fill_(0, self._send(blank), 0)
        return taken.view(lead + self._form)

    def _send(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._rows.device, non_blocking=self._at_once)

    def state(self, used: int) -> Tensor:
        """The first slots on the CPU, (used, N, ...); copies unless the device is the CPU."""
        return self._slots[:used].cpu()

    def load(self, stored: Tensor, start: int = 0) -> None:
        """Load (T, N, ...) observations from `state`, beginning at slot `start`."""
        # directly, since a second tensor may not fit on the device
        self._slots[start : start + len(stored)].copy_(stored)


def make_storage(
    shape: tuple[int, ...], dtype: np.dtype[Any], device: torch.device | None, folder: Path | None
) -> Storage:
    """Storage on a device or in a folder; in RAM if both are None.

    Raises:
        ValueError: if both are given, or the folder does not exist.
    """
    if device is not None and folder is not None:
        raise ValueError(f"memory_device={device}, memory_folder={folder}: use only one of them")
    return ArrayStorage(shape, dtype, folder) if device is None else TensorStorage(shape, dtype, device)
