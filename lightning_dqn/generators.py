"""The random generators that a whole process shares: noted in a checkpoint and put back where training goes on.

Dropout and noisy networks draw from torch's, and an environment may draw from Python's or NumPy's.
"""

import random
from typing import Any

import numpy as np
import torch


def generators_state(device: torch.device) -> dict[str, Any]:
    """Where torch's generators (of the CPU and of the device), Python's and NumPy's stand, as tensors and plain values.

    Args:
        device: that is trained on.
    """
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(key, np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_generators(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back where `generators_state` found them; one of a device only on a device of that kind.

    Args:
        state: what `generators_state` gave.
        device: that is trained on.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, *others = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])
