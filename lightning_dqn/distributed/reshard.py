"""Reshards the replay memories of several ranks for another world size.

The input is the `ReplayMemory.state_dict` of each old rank, the output is for `ReplayMemory.refill` on each new rank.
Legend: N envs, k frames in a stack, n rewards summed, T time steps, W new ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# parts of a stream by age; every new rank gets the same number of rows of each
AGES = 10
# time steps of a piece, for each frame of a stack: a cut costs as many transitions as a stack has frames
SHORTEST = 32


def reshard(
    states: Sequence[dict[str, Any]], *, rank: int, world_size: int, slots: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the shard of one new rank: pieces of the old ranks' streams, to be concatenated, oldest first.

    Each old stream is cut by age into ten parts, or fewer if pieces would get shorter than 32 k time steps, and each
    part into W pieces of the same length to within one time step, one for each new rank. All shards therefore
    have equally many rows of every old rank and age, to within ten rows of each old rank and environment.

    Every row goes to one new rank. No sampled transition crosses a cut: episodes that continue after it
    are kept as truncated, which makes n - 1 sums of rewards shorter. At each of the fewer than
    10 W cuts of a stream, at most k transitions of each environment are lost: the one whose next observation is in the
    next piece, and those at the beginning of that piece whose stacks are not in it. That is at most one in 32, except
    in streams of fewer than 32 k W time steps.

    Args:
        states: `ReplayMemory.state_dict` of all old ranks; not changed.
        rank: the new rank.
        world_size: new ranks, W.
        slots: capacity of the new memory in time steps; older rows are left out.

    Yields:
        Copies of rows by name, (T, N, ...); `playable` marks those that can be sampled. `priority`, with a prioritized
        sampler, is 0 for rows that were not eligible yet.
    """
    pieces = []
    for old_rank, state in enumerate(states):
        length = len(state["rows"]["playable"])
        ages = min(AGES, max(1, length // (SHORTEST * _frames(state) * world_size)))
        cuts = [i * length // (ages * world_size) for i in range(ages * world_size + 1)]
        for age in range(ages):
            i = age * world_size + (rank - old_rank) % world_size
            # ranks step in parallel: rows equally far from the end are equally old
            pieces.append((cuts[i + 1] - length, old_rank, cuts[i], cuts[i + 1]))
    pieces.sort()
    too_many = sum(stop - start for *_, start, stop in pieces) - slots
    for _, old_rank, start, stop in pieces:
        left_out = min(max(too_many, 0), stop - start)
        too_many -= left_out
        if start + left_out < stop:
            yield _piece(states[old_rank], start + left_out, stop)


def _piece(state: dict[str, Any], start: int, stop: int) -> dict[str, NDArray[Any]]:
    """The rows of a ring from time step `start` to `stop`, counted from the oldest, as a separate stream."""
    rows = {name: tensor.numpy() for name, tensor in state["rows"].items()}
    used, num_envs = rows["playable"].shape
    if "priorities" in state["sampler"]:
        rows["priority"] = state["sampler"]["priorities"].numpy().reshape(-1, num_envs)[:used]
    begin = (state["cursor"] + 1) % used + start
    end = begin + stop - start
    piece = {
        name: np.concatenate([array[begin:end], array[max(begin - used, 0) : max(end - used, 0)]])
        for name, array in rows.items()
    }
    playable, frames = piece["playable"], _frames(state)
    # the k - 1 oldest slots of a full ring hold frames for those after them
    playable[: max(used + frames - 1 - state["slots"] - start, 0)] = False
    # the next observation of the last row is in another piece
    playable[-1] = False
    piece["truncated"][-2:-1] |= playable[-2:-1] & ~piece["terminated"][-2:-1]
    if frames > 1:
        age = piece["age"][: frames - 1]
        playable[: frames - 1] &= age <= np.arange(len(age))[:, None]
    return piece


def _frames(state: dict[str, Any]) -> int:
    # older states have no frame_stack
    frames: int = state.get("frame_stack", 1)
    return frames
