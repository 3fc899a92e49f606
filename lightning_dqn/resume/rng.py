"""The global random generators of a process: dropout and noisy networks use torch's, environments may use Python's or
NumPy's."""

import random
from typing import Any

import numpy as np
import torch

from lightning_dqn.resume.content import check_dict, check_tensor, invalid


def get_rng_state(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators (of the CPU and of the device), Python's and NumPy's, as plain values.

    Args:
        device: device of the training.
    """
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(key, np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def check_rng_state(state: Any, name: str) -> None:
    """Check that generators can load a state, by loading it into temporary ones.

    Raises:
        CheckpointError: naming the generator whose state does not fit.
    """
    check_dict(state, name, ("torch", "python", "numpy"))
    for key, value in state.items():
        if key not in ("python", "numpy"):
            check_tensor(value, f"{name}.{key}", dtype=torch.uint8, shape=(None,))
    for key, load in (
        ("torch", lambda: torch.Generator().set_state(state["torch"])),
        ("python", lambda: random.Random().setstate(_python(state["python"]))),
        ("numpy", lambda: np.random.RandomState().set_state(_numpy(state["numpy"]))),
    ):
        try:
            load()
        except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError, IndexError) as error:
            invalid(f"{name}.{key}", f"is no state of a generator ({str(error).splitlines()[0]})")


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the states from `get_rng_state`; the state of a device is only restored on a device of that type.

    Args:
        state: state that `check_rng_state` accepts.
        device: device of the training.
    """
    random.setstate(_python(state["python"]))
    np.random.set_state(_numpy(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


def seed_rank(rank: int, updates: int) -> None:
    """Seed the generators of one rank of a run without saved generator states.

    All ranks start with the same seed, so that their networks are equal; afterwards each rank needs its own stream. A
    run that resumes without states must not repeat the random numbers of its start.

    Args:
        rank: rank of this process.
        updates: number of updates of the run so far.
    """
    if rank or updates:
        seeds = np.random.SeedSequence([torch.initial_seed(), rank, updates]).generate_state(3)
        torch.manual_seed(int(seeds[0]))
        random.seed(int(seeds[1]))
        np.random.seed(seeds[2])


def _python(state: Any) -> tuple[Any, ...]:
    version, words, gauss = state
    if gauss is not None and type(gauss) is not float:
        raise TypeError("the last number is no float")
    return version, tuple(words), gauss


def _numpy(state: Any) -> tuple[Any, ...]:
    kind, key, position, has_gauss, cached = state
    if not 0 <= int(key.min()) <= int(key.max()) < 2**32:
        raise ValueError("words are not of 32 bits")
    return kind, key.numpy().astype(np.uint32), position, has_gauss, cached
