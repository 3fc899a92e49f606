"""Tries snapshots out on throwaway copies: whether a resume of these environments is exact is found, not assumed."""

import copy
import io
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from lightning_dqn.snapshots.encoding import CannotSnapshotError, snapshot
from lightning_dqn.snapshots.restoring import CannotRestoreError, restore

Envs = VectorEnv[Any, Any, Any]
_OUTCOME = ("observations", "rewards", "terminated", "truncated")


def prove(make: Callable[[], Envs], seed: int, steps: int = 128) -> str | None:
    """Whether snapshots of such environments are exact, or else a line that says why not.

    Of two copies, one plays; the other is given its snapshot, by way of a checkpoint's bytes, when it has just been
    made, and once more, in the midst of something else, when an episode of the first has just ended. Each time both
    play the same random actions. The random numbers of this process are left as they were.

    Args:
        make: makes the environments; called twice, and both are closed.
        seed: of the first copy's episodes and of the actions.
        steps: that each of the three plays takes at most, in each environment; a play stops before that when all
            environments have ended two episodes.

    Returns:
        None if every observation, reward and flag was the same to the bit.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    copies: list[Envs] = []
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                copies.append(make())
            return _try(copies[0], copies[1], seed, steps)
    finally:
        for envs in copies:
            envs.close()
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _try(first: Envs, second: Envs, seed: int, steps: int) -> str | None:
    try:
        actions = _Actions(first, seed)
        actions.look(first.reset(seed=seed)[-1])
        for _ in range(8):
            actions.look(first.step(actions.draw())[-1])
        if difference := _compare(first, second, actions, steps):
            return difference
        for _ in range(steps):
            _, _, terminated, truncated, info = first.step(actions.draw())
            actions.look(info)
            if (terminated | truncated).any():
                break
        elsewhere = _Actions(second, seed)
        elsewhere.look(second.reset(seed=seed + 1)[-1])
        second.step(elsewhere.draw())
        return _compare(first, second, actions, steps)
    except (CannotSnapshotError, CannotRestoreError) as refusal:
        return str(refusal)
    # theirs, of any kind; the run will meet it too, and say where
    except Exception as error:
        return f"a copy of the environments failed: {type(error).__name__}: {error}"


class _Actions:
    """Random actions that the environments allow, if they say so in `info["action_mask"]`."""

    def __init__(self, envs: Envs, seed: int) -> None:
        self._space = copy.deepcopy(envs.action_space)
        self._space.seed(seed)
        self._first = int(getattr(envs.single_action_space, "start", 0))
        self._masks: Any = ()

    def look(self, info: dict[str, Any]) -> None:
        """See what the environments said last."""
        self._masks = info.get("action_mask", ())

    def draw(self) -> Any:
        """One action an environment."""
        actions = self._space.sample()
        for i, mask in enumerate(self._masks):
            allowed = np.flatnonzero(mask)
            if len(allowed):
                actions[i] = self._first + allowed[actions[i] % len(allowed)]
        return actions


def _compare(first: Envs, second: Envs, actions: _Actions, steps: int) -> str | None:
    """Give the second the first's snapshot and let both play on; what is not the same, if anything."""
    checkpoint = io.BytesIO()
    torch.save(snapshot(first), checkpoint)
    checkpoint.seek(0)
    restore(second, torch.load(checkpoint, weights_only=True))
    ended = np.zeros(first.num_envs, dtype=np.int64)
    for step in range(1, steps + 1):
        action = actions.draw()
        expected, outcome = first.step(action), second.step(copy.deepcopy(action))
        actions.look(expected[-1])
        for name, ours, theirs in zip(_OUTCOME, outcome, expected, strict=False):
            if not _identical(ours, theirs):
                return f"{step} steps after it was put back, {name} differ from those without the interruption"
        ended += expected[2] | expected[3]
        if (ended >= 2).all():
            break
    return None


def _identical(a: Any, b: Any) -> bool:
    """Equal to the bit: same types, same dtypes, same bytes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and _identical([*a.values()], [b[key] for key in a])
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_identical, a, b))
    if isinstance(a, np.ndarray) and a.dtype != object:
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return bool(np.array_equal(a, b))
