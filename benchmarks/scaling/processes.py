"""What the processes of a measurement do: one rank alone, one with nobody to wait for, two ranks, bare messages."""

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

# bytes of what is sent: an update's gradient may be of any size, what ranks say at a meeting is small
SIZES = {
    "all_reduce": (64, 16_384, 69_640, 262_144, 1_048_576, 3_145_728, 6_750_000),
    "all_gather": (32, 4_096, 65_536),
    "broadcast": (8, 4_096, 65_536),
}
REPEATS = 400
# a rank works for so long between two messages, as it does in training: caches cool, cores fall asleep, and all ranks
# come at about the same moment, when some kernels let their threads wait for 3 ms; who come apart are served sooner
WORK_S = 5e-4
HOPS = 40
# about what a call takes here; a rank that slept so long computes more slowly at first, as one does that waited
ANSWER_S = 2e-4


def single(job: Job) -> Result:
    """The trace of a run of one rank."""
    return _train(job, devices=1)


def answered(job: Job) -> Result:
    """The trace of the first of two ranks, where nobody else is: a call sleeps for a while and answers nonsense."""
    distributed.init_process_group("fake", rank=0, world_size=2)
    for name in COLLECTIVES:
        setattr(distributed, name, _after_a_sleep(getattr(distributed, name)))
    # the ranks meet in a group of their own, of gloo, where that is not what they have
    distributed.new_group = lambda **_: distributed.group.WORLD
    return _train(job, devices=2)


def _after_a_sleep(call: Callable[..., Any]) -> Callable[..., Any]:
    def sleeping(*args: Any, **kwargs: Any) -> Any:
        time.sleep(ANSWER_S)
        return call(*args, **kwargs)

    return sleeping


def together(job: Job) -> Result:
    """The trace of one of two ranks that really talk to each other."""
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
    """When one of two ranks entered and left each of many collective calls, and what a message takes one way."""
    distributed.init_process_group("gloo")
    spans = {kind: {size: _spans(_call(kind, size)) for size in sizes} for kind, sizes in SIZES.items()}
    hop = _hop_s()
    distributed.destroy_process_group()
    return {"figures": {"hop_us": hop * 1e6}, "notes": {"spans": spans}}


def _call(kind: str, size: int) -> Callable[[], object]:
    """One collective call of a kind, about so many bytes."""
    said = torch.zeros(size, dtype=torch.uint8).view(torch.float32)
    if kind == "all_reduce":
        return lambda: distributed.all_reduce(said)
    if kind == "broadcast":
        return lambda: distributed.broadcast(said, src=0)
    heard = [torch.empty_like(said) for _ in range(distributed.get_world_size())]
    return lambda: distributed.all_gather(heard, said)


def _spans(call: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds at which each call was entered and left; the first few find their way."""
    found = []
    for _ in range(REPEATS):
        _work(WORK_S)
        entered = time.perf_counter()
        call()
        found.append((entered, time.perf_counter()))
    return found[5:]


def _hop_s() -> float:
    """Seconds that a small message takes to the other rank, from many that go to and fro."""
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
