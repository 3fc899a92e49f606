"""What one draw from a memory, and one row into it, cost at 10^3 to 10^6 rows: this package's and the peer's."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces

from benchmarks.settings import TEXTBOOK, Job, Result

SIZES = (1_000, 10_000, 100_000, 1_000_000)
EPISODE_LENGTH = 200
OBSERVATION_SPACE = spaces.Box(-1, 1, (4,), np.float32)
ACTION_SPACE = spaces.Discrete(2)


def ours(job: Job) -> Result:
    """Microseconds a call of `ReplayMemory.sample(1, 128)` and `append` of one environment's step."""
    from lightning_dqn.replay import ReplayMemory  # noqa: PLC0415  # one package a process

    action, reward = np.zeros(1, np.int64), np.ones(1)
    observations, no, yes = _observations(), np.zeros(1, np.bool_), np.ones(1, np.bool_)

    def make(size: int) -> tuple[Callable[[int], None], Callable[[], Any]]:
        memory = ReplayMemory(
            capacity=size, num_envs=1, observation_space=OBSERVATION_SPACE, gamma=TEXTBOOK.gamma, seed=job.seed
        )
        memory.begin(observations[0])

        def append(i: int) -> None:
            memory.append(action, reward, no, yes if i % EPISODE_LENGTH == 0 else no, observations[i % 1000])

        return append, lambda: memory.sample(1, TEXTBOOK.batch_size)

    return _costs(make, job.seconds)


def sb3(job: Job) -> Result:
    """Microseconds a call of `ReplayBuffer.sample(128)` and `add` of one environment's step."""
    from stable_baselines3.common.buffers import ReplayBuffer  # noqa: PLC0415  # one package a process

    np.random.seed(job.seed)
    action, reward, infos = np.zeros(1, np.int64), np.ones(1), [{"TimeLimit.truncated": False}]
    observations, no, yes = _observations(), np.zeros(1, np.bool_), np.ones(1, np.bool_)

    def make(size: int) -> tuple[Callable[[int], None], Callable[[], Any]]:
        memory = ReplayBuffer(size, OBSERVATION_SPACE, ACTION_SPACE, "cpu")

        def append(i: int) -> None:
            done = yes if i % EPISODE_LENGTH == 0 else no
            memory.add(observations[i % 1000 - 1], observations[i % 1000], action, reward, done, infos)

        return append, lambda: memory.sample(TEXTBOOK.batch_size)

    return _costs(make, job.seconds)


def _observations() -> np.ndarray[Any, np.dtype[np.float32]]:
    """(1000, 1, 4) to take in turn."""
    return np.random.default_rng(0).uniform(-1, 1, (1000, 1, 4)).astype(np.float32)


def _costs(make: Callable[[int], tuple[Callable[[int], None], Callable[[], Any]]], seconds: float) -> Result:
    """Time full memories of all sizes, which take turns: the machine's pace changes, and must not look like size."""
    calls: dict[str, Callable[[], Any]] = {}
    for size in SIZES:
        append, sample = make(size)
        for i in range(size + 1):
            append(i)
        calls[f"append_{size}_us"] = partial(_append_next, append, itertools.count(size))
        calls[f"sample_{size}_us"] = sample
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(blocks["sample_1000_us"]) < 5:
        for name, call in calls.items():
            blocks[name].append(_microseconds(call))
    figures = {name: statistics.median(costs) for name, costs in blocks.items()}
    for kind in ("append", "sample"):
        costs = [figures[f"{kind}_{size}_us"] for size in SIZES]
        figures[f"{kind}_spread"] = max(costs) / min(costs)
    return {"figures": figures, "notes": {"blocks_of_100_calls": len(blocks["sample_1000_us"])}}


def _append_next(append: Callable[[int], None], turn: Iterator[int]) -> None:
    append(next(turn))


def _microseconds(call: Callable[[], Any]) -> float:
    """What one of 100 calls takes, after a few that find their way into the caches."""
    for _ in range(5):
        call()
    start = time.perf_counter()
    for _ in range(100):
        call()
    return (time.perf_counter() - start) / 100 * 1e6
