"""How much RAM a memory takes, and how much this machine, or the part that this process may use, has left."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

# action 8, reward 4, three flags
BYTES_OF_A_ROW = 15


def memory_bytes(capacity: int, observation_space: gym.Space[Any], other_bytes: int) -> int:
    """Bytes that a full `ReplayMemory` takes; one observation a row, float64 as float32.

    Args:
        capacity: transitions, over all environments.
        observation_space: space of one observation.
        other_bytes: that its sampler, and masks, take a row.
    """
    dtype = np.dtype(np.float32 if observation_space.dtype == np.float64 else observation_space.dtype)
    return capacity * (math.prod(observation_space.shape or ()) * dtype.itemsize + BYTES_OF_A_ROW + other_bytes)


def available_ram(root: Path = Path("/")) -> int | None:
    """Bytes that can still be used, by the kernel's own estimate and the limits of our control groups.

    Args:
        root: where `proc` and `sys` lie.

    Returns:
        None on systems that don't say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        values = {name: value for name, _, value in (line.partition(":") for line in lines)}
        free = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return None
    return min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group above this process has left, of version 2 or 1."""
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
