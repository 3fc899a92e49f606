"""Size of a replay memory, and the space available for it in RAM, on a device or in a file system.

The RAM is that of this machine, or of the part of it that this process may use.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from lightning_dqn.storage.arrays import check_folder, stored_form

# action 8, reward 4, three flags
BYTES_OF_A_ROW = 15
# the largest part of what is available that a memory may ask for
MAX_FRACTION = 0.8


class MemorySize:
    """Size of a full `ReplayMemory`, compared with the available space.

    Args:
        capacity: transitions, over all environments.
        observation_space: space of one observation.
        other_bytes: that its sampler, and masks, take a row.
        frame_stack: frames in an observation, of which one is kept, and a byte that says how many came before it.
        device: stores the observations; None for RAM.
        folder: its file system stores the observations; None for RAM.

    Attributes:
        ram: bytes in RAM.
        elsewhere: bytes on the device or in the file.

    Raises:
        ValueError: if observations are no such stacks.
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
        both = f"{_format_bytes(self.elsewhere)} {place} and {ram}" if self.elsewhere else ram
        return f"memory: {self.capacity:,} transitions, {both}"

    def check(self) -> None:
        """Check that a full memory fits: allocation is lazy, so a lack would show only as it fills.

        Raises:
            ValueError: naming what it needs and what there is, or that there is no such place.
        """
        self._check_available(self.ram, available_ram(), "")
        if self._device is not None:
            self._check_available(self.elsewhere, _available_on(self._device), f" on {self._device}")
        elif self._folder is not None:
            check_folder(self._folder)
            self._check_available(self.elsewhere, shutil.disk_usage(self._folder).free, f" in {self._folder}")

    def _check_available(self, needed: int, available: int | None, where: str) -> None:
        if available is not None and needed > MAX_FRACTION * available:
            raise ValueError(
                f"data.memory_capacity={self.capacity}: needs {needed:,} bytes, more than {MAX_FRACTION:.0%} of "
                f"the {available:,} that are available{where}; lower it, or keep observations elsewhere by "
                "data.memory_device or data.memory_folder"
            )


def _format_bytes(count: float) -> str:
    """Bytes in three digits, as 7.08 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _available_on(device: torch.device) -> int | None:
    """Bytes that are free on a device; None if the device does not report it.

    Raises:
        ValueError: if there is no such device.
    """
    if device.type != "cuda":
        return None
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"data.memory_device={device}: no such device here; name another, or leave it out")
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def available_ram(root: Path = Path("/")) -> int | None:
    """Available RAM in bytes: MemAvailable, limited by the control groups of this process.

    Args:
        root: directory that contains `proc` and `sys`.

    Returns:
        None if the system does not report it.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        values = {name: value for name, _, value in (line.partition(":") for line in lines)}
        free = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return None
    return min([free, *_cgroup_headroom(root)])


def _cgroup_headroom(root: Path) -> Iterator[int]:
    """Yields the bytes left in each control group of this process, version 2 or 1."""
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / path.lstrip("/")
        # a container may see its own group as the top
        for folder in [group, *group.parents, top]:
            if folder.is_relative_to(top):
                # no limit is the word max
                with contextlib.suppress(OSError, ValueError):
                    yield _read(folder, limit) - _read(folder, usage) + _reclaimable(folder)


def _read(folder: Path, name: str) -> int:
    return int((folder / f"memory.{name}").read_text())


def _reclaimable(folder: Path) -> int:
    """Bytes of files that were read and that the kernel gives up before anything else."""
    for line in (folder / "memory.stat").read_text().splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0
