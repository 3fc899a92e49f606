"""Time to sample a minibatch and to append a row at 10^3 to 10^6 rows, for this package and Stable-Baselines3.

Also the additional time of prioritized replay.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces

from benchmarks.settings import TEXTBOOK, Job, Result

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PRIORITY_SIZES = SIZES[1:]
EPISODE_LENGTH = 200
OBSERVATION_SPACE = spaces.Box(-1, 1, (4,), np.float32)
ACTION_SPACE = spaces.Discrete(2)


def ours(job: Job) -> Result:
    """Microseconds per call of `ReplayMemory.sample(1, 128)` and `append` of one environment's step."""
    from lightning_dqn.replay import ReplayMemory  # noqa: PLC0415  # one package per process

    def make(size: int) -> tuple[Callable[[int], None], Callable[[], Any]]:
        memory = ReplayMemory(
            capacity=size, num_envs=1, observation_space=OBSERVATION_SPACE, gamma=TEXTBOOK.gamma, seed=job.seed
        )
        return _appending(memory), lambda: memory.sample(1, TEXTBOOK.batch_size)

    return _costs(make, job.seconds)


def prioritized(job: Job) -> Result:
    """Microseconds of a uniform `sample(1, 128)`, and of a prioritized one with its priority update."""
    if not job.compiled:
        os.environ["CXX"] = "/nowhere/c++"
    from lightning_dqn.replay import ReplayMemory, UniformSampler  # noqa: PLC0415  # as above
    from lightning_dqn.sampling.prioritized import PrioritizedSampler  # noqa: PLC0415  # as above

    rng = np.random.default_rng(job.seed)
    errors = itertools.cycle(rng.exponential(size=(64, TEXTBOOK.batch_size)).astype(np.float32))

    def make(size: int, sampler: Any) -> tuple[Callable[[int], None], Any]:
        memory = ReplayMemory(
            capacity=size,
            num_envs=1,
            observation_space=OBSERVATION_SPACE,
            gamma=TEXTBOOK.gamma,
            sampler=sampler,
            seed=job.seed,
        )
        return _filled(_appending(memory), size), memory

    def sample_and_write(memory: Any) -> None:
        batch = memory.sample(1, TEXTBOOK.batch_size)
        memory.sampler.update_priorities(batch.index.numpy().ravel(), next(errors))

    calls: dict[str, Callable[[], Any]] = {}
    sizes = PRIORITY_SIZES if job.compiled else PRIORITY_SIZES[:-1]  # filling the largest by append would take minutes
    for size in sizes:
        append, uniform = make(size, UniformSampler)
        append_prioritized, memory = make(size, PrioritizedSampler)
        memory.sampler.beta = 0.7
        # as in training, where most rows have been sampled before
        for _ in range(2 * size // TEXTBOOK.batch_size):
            sample_and_write(memory)
        calls[f"uniform_{size}_us"] = partial(uniform.sample, 1, TEXTBOOK.batch_size)
        calls[f"prioritized_{size}_us"] = partial(sample_and_write, memory)
        calls[f"append_{size}_us"] = partial(_append_next, append, itertools.count(size))
        calls[f"append_prioritized_{size}_us"] = partial(_append_next, append_prioritized, itertools.count(size))
    # CPU time of the thread, which other processes on the core do not affect
    blocks = _take_turns(calls, job.seconds, time.thread_time)
    figures = {name: statistics.median(costs) for name, costs in blocks.items()}
    for size in sizes:
        pairs = zip(blocks[f"prioritized_{size}_us"], blocks[f"uniform_{size}_us"], strict=True)
        figures[f"ratio_{size}"] = statistics.median(a / b for a, b in pairs)
    return {"figures": figures, "notes": {"blocks_of_100_calls": len(blocks["uniform_10000_us"])}}


def _appending(memory: Any) -> Callable[[int], None]:
    """A function that appends the i-th step of one environment to a `ReplayMemory`."""
    action, reward = np.zeros(1, np.int64), np.ones(1)
    observations, no, yes = _observations(), np.zeros(1, np.bool_), np.ones(1, np.bool_)
    memory.begin(observations[0])

    def append(i: int) -> None:
        memory.append(action, reward, no, yes if i % EPISODE_LENGTH == 0 else no, observations[i % 1000])

    return append


def _filled(append: Callable[[int], None], size: int) -> Callable[[int], None]:
    """`_appending`, with a full memory."""
    for i in range(size + 1):
        append(i)
    return append


def sb3(job: Job) -> Result:
    """Microseconds per call of `ReplayBuffer.sample(128)` and `add` of one environment's step."""
    from stable_baselines3.common.buffers import ReplayBuffer  # noqa: PLC0415  # one package per process

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
    """(1000, 1, 4) observations to cycle through."""
    return np.random.default_rng(0).uniform(-1, 1, (1000, 1, 4)).astype(np.float32)


def _costs(make: Callable[[int], tuple[Callable[[int], None], Callable[[], Any]]], seconds: float) -> Result:
    """Time full memories of all sizes alternately, since the speed of the machine varies over time."""
    calls: dict[str, Callable[[], Any]] = {}
    for size in SIZES:
        append, sample = make(size)
        calls[f"append_{size}_us"] = partial(_append_next, _filled(append, size), itertools.count(size))
        calls[f"sample_{size}_us"] = sample
    blocks = _take_turns(calls, seconds)
    figures = {name: statistics.median(costs) for name, costs in blocks.items()}
    for kind in ("append", "sample"):
        costs = [figures[f"{kind}_{size}_us"] for size in SIZES]
        figures[f"{kind}_spread"] = max(costs) / min(costs)
    return {"figures": figures, "notes": {"blocks_of_100_calls": len(blocks["sample_1000_us"])}}


def _take_turns(
    calls: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Microseconds of each call, one value per turn."""
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(blocks.values()))) < 5:
        for name, call in calls.items():
            blocks[name].append(_microseconds(call, clock))
    return blocks


def _append_next(append: Callable[[int], None], turn: Iterator[int]) -> None:
    append(next(turn))


def _microseconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Mean time of 100 calls after a warm-up."""
    for _ in range(5):
        call()
    start = clock()
    for _ in range(100):
        call()
    return (clock() - start) / 100 * 1e6
