"""Checks of the state of a replay memory and its sampler, before any of it is loaded. Legend: N envs, S slots."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dqn.resume.content import check_dict, check_float, check_generator, check_int, check_tensor, invalid

MAX_SLOTS = 2**40
# keeps sums over all slots finite
MAX_PRIORITY = 1e200


def check_memory_state(state: Any, own: Mapping[str, Any], name: str = "memory", *, same_size: bool = True) -> None:
    """Check that a memory can load a state: types and shapes of its rows, and consistent positions.

    Args:
        state: state of a memory in a checkpoint.
        own: `state_dict()` of the empty memory that loads it.
        name: name of the state in the checkpoint.
        same_size: whether the number of slots must be equal.

    Raises:
        CheckpointError: naming the first value that does not fit.
    """
    check_dict(state, name, tuple(own))
    for key in ("n_step", "frame_stack", *(("slots",) if same_size else ())):
        if check_int(state[key], f"{name}.{key}") != own[key]:
            invalid(f"{name}.{key}", f"is {state[key]}, not {own[key]}")
    slots, steps = check_int(state["slots"], f"{name}.slots", 2, MAX_SLOTS), check_int(state["steps"], f"{name}.steps")
    used = min(steps + 1, slots)
    if check_int(state["cursor"], f"{name}.cursor") != steps % slots:
        invalid(f"{name}.cursor", f"is {state['cursor']} after {steps} steps in {slots} slots")
    rows = check_dict(state["rows"], f"{name}.rows", tuple(own["rows"]))
    for key, tensor in own["rows"].items():
        check_tensor(rows[key], f"{name}.rows.{key}", dtype=tensor.dtype, shape=(used, *tensor.shape[1:]))
    if "age" in own["rows"] and used and int(rows["age"].max()) >= state["frame_stack"]:
        invalid(f"{name}.rows.age", f"is more than the frames of a stack of {state['frame_stack']}")
    num_envs = own["after_end"].shape[0]
    check_tensor(state["after_end"], f"{name}.after_end", dtype=torch.bool, shape=(num_envs,))
    eligible = _eligible_rows(state)
    drawable = check_tensor(state["drawable"], f"{name}.drawable", dtype=torch.int64, shape=(slots,)).numpy()
    if not np.array_equal(drawable, np.bincount(eligible // num_envs, minlength=slots)):
        invalid(f"{name}.drawable", "does not agree with the rows")
    _check_sampler(state["sampler"], own["sampler"], eligible, slots * num_envs, f"{name}.sampler")


def check_actions(state: Mapping[str, Any], space: Any, name: str) -> None:
    """Check that the actions of a memory state are in the action space.

    Raises:
        CheckpointError: if one is not.
    """
    rows = check_dict(check_dict(state, name, ("rows",))["rows"], f"{name}.rows", ("action", "playable"))
    playable = check_tensor(rows["playable"], f"{name}.rows.playable", dtype=torch.bool, shape=(None, None))
    taken = check_tensor(rows["action"], f"{name}.rows.action", dtype=torch.int64, shape=playable.shape)
    actions = taken[playable] - int(space.start)
    if len(actions) and not 0 <= int(actions.min()) <= int(actions.max()) < int(space.n):
        invalid(f"{name}.rows.action", f"holds actions outside {space}")


def _eligible_rows(state: Mapping[str, Any]) -> NDArray[np.int64]:
    """The rows of a memory that can be sampled, oldest first, from its positions and flags; see `ReplayMemory`."""
    steps, slots = state["steps"], state["slots"]
    # the newest n_step - 1 steps lack later rewards, the oldest frame_stack - 1 slots contain frames only
    times = np.arange(max(0, steps + state["frame_stack"] - slots), max(0, steps - state["n_step"] + 1))
    order = times % slots
    playable = state["rows"]["playable"].numpy()
    num_envs = playable.shape[1]
    time, env = playable[order].nonzero()
    rows: NDArray[np.int64] = order[time] * num_envs + env
    return rows


def _check_sampler(state: Any, own: Mapping[str, Any], eligible: NDArray[np.int64], capacity: int, name: str) -> None:
    """Check that a sampler can load a state, and that its rows are the eligible ones."""
    check_dict(state, name, tuple(own))
    if state.keys() != own.keys():
        invalid(name, f"holds {sorted(map(str, state))}, not {sorted(own)}")
    if "rng" in own:
        check_generator(state["rng"], f"{name}.rng")
    if {"ring", "first", "count"} <= own.keys():
        ring = check_tensor(state["ring"], f"{name}.ring", dtype=torch.int64, shape=(capacity,)).numpy()
        first = check_int(state["first"], f"{name}.first", 0, capacity - 1)
        count = check_int(state["count"], f"{name}.count", 0, capacity)
        if not np.array_equal(ring.take(range(first, first + count), mode="wrap"), eligible):
            invalid(f"{name}.ring", "does not hold the rows that can be drawn")
    if "priorities" in own:
        priorities = check_tensor(state["priorities"], f"{name}.priorities", dtype=torch.float64, shape=(capacity,))
        mine = priorities.numpy()[eligible]
        largest = check_float(state["largest"], f"{name}.largest", 0, MAX_PRIORITY)
        if not ((mine > 0) & (mine <= largest)).all() or np.count_nonzero(priorities.numpy()) != len(mine):
            invalid(f"{name}.priorities", "are not in (0, largest] for the rows that can be drawn, and 0 for others")
        check_float(state["beta"], f"{name}.beta", 0, 1)
