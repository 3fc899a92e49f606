"""Size of a replay memory, and the space available for it in RAM, on a device or in a file system."""

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import psutil
import torch

from lightning_dqn.storage.arrays import check_folder, stored_form

# action 8, reward 4, three flags
BYTES_OF_A_ROW = 15
# the largest fraction of the available space that a memory may take
MAX_FRACTION = 0.8


class MemorySize:
    """Size of a full `ReplayMemory`, compared with the available space.

    Args:
        capacity: transitions, over all environments.
        observation_space: space of one observation.
        other_bytes: bytes per row of the sampler and of action masks.
        frame_stack: frames in an observation, of which one is stored, with a byte for the number of frames before it.
        device: stores the observations; None for RAM.
        folder: its file system stores the observations; None for RAM.

    Attributes:
        ram: bytes in RAM.
        elsewhere: bytes on the device or in the file.

    Raises:
        ValueError: if the observations are not stacks of `frame_stack` frames.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: gym.Space[Any],
        other_bytes: int,
        *,
        frame_stack: int = 1,
        device: torch.device | None = None,
        folder: Path | None = None,
    ) -> None:
        self.capacity = capacity
        self._device = None if device is None or device.type == "cpu" else device
        self._folder = folder
        shape, dtype = stored_form(observation_space, frame_stack)
        observations = capacity * math.prod(shape) * dtype.itemsize
        self.elsewhere = observations if self._device is not None or folder is not None else 0
        self.ram = capacity * (BYTES_OF_A_ROW + other_bytes + (frame_stack > 1)) + observations - self.elsewhere

    def describe(self) -> str:
        """One line for the start of a run."""
        ram = f"{_format_bytes(self.ram)} in RAM"
        place = f"on {self._device}" if self._device is not None else f"in a file in {self._folder}"
        return f"memory: {self.capacity:,} transitions, " + (
            f"{_format_bytes(self.elsewhere)} {place} and {ram}" if self.elsewhere else ram
        )

    def check(self) -> None:
        """Check that a full memory fits: allocation is lazy, so a lack of space would show only as it fills.

        Raises:
            ValueError: naming the needed and the available bytes, or the device or folder that does not exist.
        """
        self._check_available(self.ram, available_ram(), "")
        if self._device is not None and self._device.type == "cuda":
            if (self._device.index or 0) >= torch.cuda.device_count():
                raise ValueError(f"memory_device={self._device}: no such device here; name another, or leave it out")
            self._check_available(self.elsewhere, torch.cuda.mem_get_info(self._device)[0], f" on {self._device}")
        elif self._device is None and self._folder is not None:
            check_folder(self._folder)
            self._check_available(self.elsewhere, shutil.disk_usage(self._folder).free, f" in {self._folder}")

    def _check_available(self, needed: int, available: int, where: str) -> None:
        if needed > MAX_FRACTION * available:
            raise ValueError(
                f"memory_capacity={self.capacity}: needs {needed:,} bytes, more than {MAX_FRACTION:.0%} of "
                f"the {available:,} that are available{where}; lower it, or keep observations elsewhere by "
                "memory_device or memory_folder"
            )


def _format_bytes(count: float) -> str:
    """Bytes in three digits, as 7.08 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def available_ram(root: Path = Path("/")) -> int:
    """Available RAM in bytes, limited by the control groups (version 2) of this process.

    Args:
        root: directory that contains `proc/self/cgroup` and `sys/fs/cgroup`, which only Linux has.
    """
    available: int = psutil.virtual_memory().available
    # no such file, or the word max for no limit
    with contextlib.suppress(OSError, StopIteration):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        top = root / "sys/fs/cgroup"
        own = top / next(line for line in groups if line.startswith("0::")).removeprefix("0::/")
        for group in (own, *own.parents[: len(own.relative_to(top).parts)]):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                # the kernel frees pages of files that were read before anything else
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                available = min(available, limit - used + int(stat.get("inactive_file", 0)))
    return available
