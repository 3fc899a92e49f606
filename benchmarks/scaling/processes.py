"""The processes of a measurement: a single rank, a rank without waiting, two ranks, and messages alone."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, distributed

from benchmarks.atari.proof import moved, weights
from benchmarks.ours import make_trainer
from benchmarks.scaling.trace import COLLECTIVES, Recorder, TraceClock
from benchmarks.scaling.workloads import WORKLOADS
from benchmarks.settings import Job, Result
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics

# sizes in bytes: gradients of any size, and the small vectors of the synchronization of env steps
SIZES = {
    "all_reduce": (64, 16_384, 69_640, 262_144, 1_048_576, 3_145_728, 6_750_000),
    "all_gather": (32, 4_096, 65_536),
    "broadcast": (8, 4_096, 65_536),
}
REPEATS = 400
# time that a rank computes between two messages, as in training: caches get cold, cores go idle, and all ranks
# enter at about the same time, when some kernels let their threads wait for 3 ms; separate entries return sooner
WORK_S = 5e-4
HOPS = 40
# about the time of a call here; after this sleep a rank computes more slowly at first, as after waiting
ANSWER_S = 2e-4


def single(job: Job) -> Result:
    """The trace of a run of one rank."""
    return _train(job, devices=1)


def answered(job: Job) -> Result:
    """The trace of one of two ranks without the other: a call sleeps briefly and returns arbitrary data."""
    distributed.init_process_group("fake", rank=0, world_size=2)
    for name in COLLECTIVES:
        setattr(distributed, name, _after_a_sleep(getattr(distributed, name)))
    # the synchronization of env steps uses a separate gloo group if the default group is not gloo
    distributed.new_group = lambda **_: distributed.group.WORLD
    return _train(job, devices=2)


def _after_a_sleep(call: Callable[..., Any]) -> Callable[..., Any]:
    def sleeping(*args: Any, **kwargs: Any) -> Any:
        time.sleep(ANSWER_S)
        return call(*args, **kwargs)

    return sleeping


def together(job: Job) -> Result:
    """The trace of one of two communicating ranks."""
    return _train(job, devices=2)


def _train(job: Job, devices: int) -> Result:
    pl.seed_everything(job.seed, verbose=False)
    workload = WORKLOADS[job.work]
    model, data, schedules = workload.make(job)
    # every iteration then makes the same calls
    data.iterations_per_chunk = 1
    start = weights(model.policy_net)
    recorder = Recorder()
    recorder.listen()
    clock = TraceClock(recorder, workload.skipped, workload.measured)
    make_trainer(job, [*schedules, EpisodeStatistics(), clock], devices).fit(model, data)
    trace = recorder.trace()
    return {
        "figures": {"iteration_ms": trace.iteration_s * 1e3, "env_steps": clock.env_steps},
        "notes": {"trace": trace.as_json(), "weights_moved": moved(start, weights(model.policy_net))},
    }


def messages(job: Job) -> Result:
    """Entry and return times of many collective calls of one of two ranks, and the one-way time of a message."""
    distributed.init_process_group("gloo")
    spans = {kind: {size: _spans(_call(kind, size)) for size in sizes} for kind, sizes in SIZES.items()}
    hop = _hop_s()
    distributed.destroy_process_group()
    return {"figures": {"hop_us": hop * 1e6}, "notes": {"spans": spans}}


def _call(kind: str, size: int) -> Callable[[], object]:
    """A function that makes one collective call of a kind and size in bytes."""
    sent = torch.zeros(size, dtype=torch.uint8).view(torch.float32)
    if kind == "all_reduce":
        return lambda: distributed.all_reduce(sent)
    if kind == "broadcast":
        return lambda: distributed.broadcast(sent, src=0)
    gathered = [torch.empty_like(sent) for _ in range(distributed.get_world_size())]
    return lambda: distributed.all_gather(gathered, sent)


def _spans(call: Callable[[], object]) -> list[tuple[float, float]]:
    """Entry and return times of calls in s, after a warm-up."""
    found = []
    for _ in range(REPEATS):
        _work(WORK_S)
        entered = time.perf_counter()
        call()
        found.append((entered, time.perf_counter()))
    return found[5:]


def _hop_s() -> float:
    """One-way time of a small message in s, from many round trips."""
    ball, first = torch.zeros(16), distributed.get_rank() == 0
    found = []
    for _ in range(REPEATS // 2):
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(HOPS // 2):
            _catch_and_throw(ball, first)
        found.append((time.perf_counter() - start) / HOPS)
    return float(np.median(found))


def _catch_and_throw(ball: Tensor, first: bool) -> None:
    if first:
        distributed.send(ball, 1)
        distributed.recv(ball, 1)
    else:
        distributed.recv(ball, 0)
        distributed.send(ball, 0)


def _work(seconds: float) -> None:
    """Keep the core and its caches busy."""
    table = np.ones(250_000)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        table.sum()
